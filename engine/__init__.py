"""Fast adversarial training: robust networks from weak adversaries and local balls.

import engine
result = engine.train(model, (images, labels), engine.Linf("8/255"))
report = engine.evaluate(result.model, x, y, engine.Linf("8/255"))

The public names and their homes stand in `__init__.pyi`. A name is loaded on first use, so that
`import engine` and `engine --help` do not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
