// Browsers start no worker for a page that is a file. Material's search then runs in a hidden frame of the page instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const script = frame.contentDocument.createElement("script")
      this.inside = new Promise((ready) => {
        script.onload = () => ready(frame.contentWindow)
      })
      frame.contentWindow.IFrameWorker = true
      frame.contentWindow.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      script.src = url
      frame.contentDocument.body.append(script)
    }

    postMessage(data) {
      this.inside.then((self) => self.dispatchEvent(new self.MessageEvent("message", { data })))
    }
  }
}
