// Draw the anywidgets of a page that has no kernel, from the state that the build stored in it.
//
// A front end of an anywidget is an ES module that needs little of its host: get, set, on, off, save_changes and send.
// Without a kernel nobody answers what it sends.

function hostModel(values) {
  const listeners = new Map();
  const call = (name) => listeners.get(name)?.forEach((listener) => listener());
  return {
    get: (name) => values[name],
    set: (name, value) => {
      values[name] = value;
      call(`change:${name}`);
      call("change");
    },
    on: (name, listener) => listeners.set(name, (listeners.get(name) ?? new Set()).add(listener)),
    off: (name, listener) => listeners.get(name)?.delete(listener),
    save_changes: () => {},
    send: () => {},
  };
}

async function hostPage() {
  const stored = document.querySelector('script[type="application/vnd.jupyter.widget-state+json"]');
  const state = stored ? JSON.parse(stored.textContent).state : {};
  const models = new Map();
  for (const view of document.querySelectorAll('script[type="application/vnd.jupyter.widget-view+json"]')) {
    const id = JSON.parse(view.textContent).model_id;
    const values = state[id]?.state;
    if (!values?._esm) continue;
    if (!models.has(id)) models.set(id, hostModel(values));
    const source = URL.createObjectURL(new Blob([values._esm], { type: "text/javascript" }));
    const { default: front } = await import(source);
    URL.revokeObjectURL(source);
    const el = document.createElement("div");
    el.dataset.page = ""; // a front end may keep its state in the address, which JupyterLab has for itself
    const style = document.createElement("style");
    style.textContent = values._css ?? "";
    view.after(style, el);
    await front.render({ model: models.get(id), el });
  }
}

document.addEventListener("DOMContentLoaded", hostPage);
