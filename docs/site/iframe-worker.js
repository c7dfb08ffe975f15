// Browsers start no worker from a file, and the search is a worker. So where the pages are opened as
// files, run its script in a hidden frame instead. The theme looks for the name `IFrameWorker`.
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inner = this.frame.contentWindow;
      this.ready = new Promise((loaded) => {
        inner.parent = window;
        inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        inner.importScripts = async (...sources) => {
          for (const source of sources) await this.load(source);
        };
        this.load(url).then(loaded);
      });
    }
    // Run a script in the frame; scripts run in the order in which they are loaded.
    load(source) {
      return new Promise((loaded, failed) => {
        const script = this.frame.contentDocument.createElement("script");
        Object.assign(script, { src: source, async: false, onload: loaded, onerror: failed });
        this.frame.contentDocument.body.append(script);
      });
    }
    postMessage(data) {
      this.ready.then(() => {
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
      });
    }
    terminate() {
      this.frame.remove();
    }
  };
}
