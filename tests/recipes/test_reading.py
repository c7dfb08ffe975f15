"""Recipes: reading, overriding, writing back, and one clear line for every mistake."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import PGD, EngineError, LocalBall, recipes
from engine.training.schedule import Schedule


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_loads_and_survives_being_written(name):
    loaded = recipes.load(name)
    assert loaded.name == name
    assert recipes.parse(tomllib.loads(recipes.dump(loaded))) == loaded


def test_overrides_take_budgets_as_people_write_them():
    loaded = recipes.load(
        "quickstart",
        {"threat.eps": "8/255", "attack.steps": "3", "data.flip": "true", "optim.batch-size": "32"},
    )
    assert loaded.threat.eps == pytest.approx(8 / 255)
    assert (loaded.attack.steps, loaded.data.flip, loaded.optim.batch_size) == (3, True, 32)


def test_none_and_lists_from_the_command_line():
    loaded = recipes.load(
        "quickstart",
        {"attack.alpha": "none", "schedule.milestones": "0.3,0.6", "attack.start": "memory"},
    )
    assert loaded.attack.alpha is None
    assert loaded.schedule.milestones == (0.3, 0.6)


def test_another_objective_starts_from_its_own_defaults():
    loaded = recipes.load("quickstart", {"objective.name": "pgd"})
    assert loaded.objective == PGD()
    back = recipes.load("quickstart", {"objective.name": "local-ball", "objective.rho": "0.3"})
    assert back.objective == LocalBall(rho=0.3)


def test_extends_takes_all_but_what_differs(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "quickstart"\n[attack]\nsteps = 1\n')
    mine, base = recipes.load(str(path)), recipes.load("quickstart")
    assert (mine.name, mine.attack.steps, mine.optim) == ("mine", 1, base.optim)


MISTAKES = [
    ({"attack.step": "2"}, "attack.steps"),
    ({"attack.steps": "0"}, "attack.steps"),
    ({"attack.steps": "two"}, "attack.steps"),
    ({"threat.eps": "-1"}, "threat.eps"),
    ({"threat.eps": "8/0"}, "threat.eps"),
    ({"threat.eps": "nan"}, "threat.eps"),
    ({"threat.norm": "L3"}, "threat.norm"),
    ({"objective.rho": "1.5"}, "objective.rho"),
    ({"objective.name": "pgdd"}, "did you mean pgd"),
    ({"objective.beta": "6"}, "objective.beta"),
    ({"optim.lr": "0"}, "optim.lr"),
    ({"weights.perturb": "0.005", "optim.name": "apex-sgd"}, "weights.perturb with optim.name"),
    ({"weights.perturb": "0.005", "weights.from_epoch": "99"}, "weights.from_epoch = 99"),
    ({"data.cutmix": "true", "attack.start": "memory"}, "data.cutmix with attack.start = memory"),
    (
        {"data.cutmix": "true", "attack.start": "random", "objective.name": "mart"},
        "the objective mart needs one label",
    ),
    (
        {"data.cutmix": "true", "attack.start": "random", "objective.name": "liet"},
        "the objective liet needs one label",
    ),
    ({"data.erase": "1.5"}, "data.erase"),
    ({"data.erase": "0.5", "data.cutout": "3"}, "data.erase and data.cutout"),
    ({"data.jitter": "1"}, "data.jitter"),
    ({"data.validation": "1.0"}, "data.validation: a count is written 1, without a point"),
    ({"data.validation": "1000.0"}, "a share lies below 1, got '1000.0'"),
    ({"data.validation": "1.5"}, "data.validation: a count is written 1"),
    ({"data.validation": "0.0"}, "data.validation"),
    ({"objective.label_smoothing": "1"}, "objective.label_smoothing"),
    ({"data.extra_share": "0"}, "data.extra_share"),
    ({"data.extra_share": "1"}, "data.extra_share"),
    ({"seed": "-3"}, "seed"),
    ({"schedule.milestones": "a,b"}, "schedule.milestones"),
]


@pytest.mark.parametrize(("overrides", "said"), MISTAKES, ids=str)
def test_mistakes_give_one_line_that_names_the_field(overrides, said):
    with pytest.raises(EngineError) as caught:
        recipes.load("quickstart", overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


FILES = [
    ("[attack]\nsteps = 0\n", "attack.steps"),
    ("[attack]\nstep = 2\n", "did you mean attack.steps"),
    ('[data]\n"\\n" = 1\n', "unknown field"),
    ('"a\\nb" = 1\n', "unknown field"),
    ("[atack]\nsteps = 2\n", "did you mean attack"),
    ("attack = 3\n", "attack must be a table"),
    ("steps = \n", "not valid TOML"),
    ('extends = "nothing"\n', "extends"),
    ('extends = "../../etc/passwd"\n', "extends"),
    ('[objective]\nname = ["a"]\n', "objective"),
    ("[objective]\nrho = 0.0\n", "objective.rho"),
    ("[data]\nvalidation = 1.0\n", "data.validation: a count is written 1, without a point"),
    ("[data]\nvalidation = true\n", "data.validation: must be a number, got true"),
    ("[data]\nsize = [true, 32]\n", "data.size: must be a number, got true"),
    ("[optim]\nepochs = true\n", "optim.epochs: must be a number, got true"),
    ("[optim]\nlr = true\n", "optim.lr: must be a number, got true"),
    ("[evaluation]\nexamples = true\n", "evaluation.examples: must be a number, got true"),
    ("[schedule]\nmilestones = [0.5, false]\n", "schedule.milestones: must be a number, got false"),
    ("[objective]\nrho = true\n", "objective.rho: must be a number, got true"),
    ('objective = {name = "trades", beta = true}\n', "objective.beta: must be a number, got true"),
    ("seed = true\n", "seed: must be a number, got true"),
]


@pytest.mark.parametrize(("text", "said"), FILES, ids=lambda v: repr(v)[:24])
def test_mistakes_in_a_file(tmp_path, text, said):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(EngineError) as caught:
        recipes.load(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("written", "read"), [("1", 1), ("0.5", 0.5), ("0.25", 0.25), ("8", 8)])
def test_validation_is_a_count_or_a_share(tmp_path, written, read):
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "quickstart"\n[data]\nvalidation = {written}\n')
    for loaded in (
        recipes.load(str(path)),
        recipes.load("quickstart", {"data.validation": written}),
    ):
        assert loaded.data.validation == read
        assert type(loaded.data.validation) is type(read)


def test_truth_values_stay_where_they_have_a_meaning(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[data]\nflip = true\n[step]\ncompile = true\n")
    loaded = recipes.load(str(path))
    assert (loaded.data.flip, loaded.step.compile) == (True, "on")


def test_missing_or_binary_file(tmp_path):
    with pytest.raises(EngineError, match="cannot read recipe"):
        recipes.load(str(tmp_path / "none.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EngineError, match="UTF-8"):
        recipes.load(str(tmp_path / "bytes.toml"))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
sections = st.sampled_from(["data", "model", "threat", "attack", "objective", "optim", "seed", "x"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(sections, json_like, max_size=4))
def test_any_tree_is_a_recipe_or_one_line(tree):
    try:
        recipes.parse(tree)
    except EngineError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_every_field_is_described():
    for objective in recipes.objectives().values():
        for name, _, _, description in recipes.options(objective):
            assert description or name in ("name", "objective.name"), name


def test_one_cycle_rises_to_one_and_falls_to_nothing():
    schedule, total = Schedule(warmup=0.25), 100
    shares = [schedule.at(i, total) for i in range(total)]
    assert shares[0] == pytest.approx(1 / 25)
    assert shares[25] == pytest.approx(1.0)
    assert max(shares) == pytest.approx(1.0)
    assert shares[:25] == sorted(shares[:25])
    assert shares[25:] == sorted(shares[25:], reverse=True)
    assert 0 < shares[-1] < 0.01


def test_piecewise_drops_at_its_milestones():
    schedule = Schedule(name="piecewise", milestones=(0.5, 0.75), factor=0.1)
    assert [schedule.at(i, 100) for i in (0, 49, 50, 74, 75, 99)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_the_radius_grows_to_eps_and_stays():
    radii = Schedule(eps_warmup=0.5).radii(0.2, 8)
    assert radii == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2])
    assert Schedule().radii(0.2, 8) is None


def test_a_radius_in_255ths_is_met_with_how_to_write_it():
    with pytest.raises(EngineError, match=r'threat.eps = 8 is more .* written "8/255"'):
        recipes.load("cifar10", {"threat.eps": "8"})
    assert recipes.load("cifar10", {"threat.eps": "8", "threat.norm": "L2"}).threat.eps == 8
