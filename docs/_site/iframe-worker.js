// Search without a server. A browser starts no worker from file://, so there the search worker of
// Material runs in a hidden frame. Material knows such a frame by the name IFrameWorker. The file's
// name keeps the plugin `offline` from loading a script for this from the network.
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.scope = frame.contentWindow;
      this.scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.scope.importScripts = async (...addresses) => {
        for (const address of addresses) await this.load(address);
      };
      this.ready = this.load(url);
    }

    load(address) {
      const script = this.scope.document.createElement("script");
      script.src = new URL(address, document.baseURI);
      return new Promise((resolve, reject) => {
        script.onload = resolve;
        script.onerror = reject;
        this.scope.document.body.append(script);
      });
    }

    async postMessage(data) {
      await this.ready; // until then nobody listens there
      this.scope.dispatchEvent(new this.scope.MessageEvent("message", { data }));
    }

    terminate() {}
  };
}
