// Clean a vector from your own pairs. All of it is computed by the kernel; without one there is only the sentence.

function render({ model, el: root }) {
  hideWords(model);
  const data = JSON.parse(model.get("data"));
  const status = el("p", { class: "nbw-status", role: "status" }, "Cleaning is computed by a kernel: run this page in JupyterLab (make lab). What it makes of 20 pairs stands in the figure and the table beside.");
  const box = el("div", { class: "nbw", role: "group", "aria-label": "Clean your own vector", "data-mode": "precomputed" }, status);
  root.append(box);

  const pairs = el("textarea", { rows: 8, "data-field": "pairs", spellcheck: "false" }, data.pairs);
  const path = el("input", { type: "text", placeholder: "my/task.json", "data-field": "path" });
  const layer = el("select", { "data-field": "layer" });
  const method = el("select", { "data-field": "method" });
  fill(method, [["prune", "prune contrast codes, refit"], ["clean", "clean the task vector's codes (the post)"]], "prune");
  const start = el("button", { type: "button", "data-field": "start" }, "Clean");
  const stop = el("button", { type: "button", "data-field": "stop", disabled: true }, "Stop");
  const bar = el("progress", { max: 1, value: 0, "aria-label": "progress of cleaning" });
  const doing = el("span", { role: "status", "data-field": "doing" });
  const problem = el("p", { class: "nbw-error", role: "alert", hidden: true });
  const result = el("div", { "data-field": "result" });
  const folder = el("input", { type: "text", value: "my-vector", "data-field": "folder" });
  const put = el("button", { type: "button", "data-field": "export", disabled: true }, "Export");
  const get = el("button", { type: "button", "data-field": "import" }, "Load");
  const files = el("p", { role: "status", "data-field": "files" });

  const complain = (sentence) => { problem.replaceChildren(sentence ?? ""); problem.hidden = !sentence; };
  let current = null; // {bias, features: [{latent, weight, on, times}]}

  function working(on) {
    start.disabled = on;
    stop.disabled = !on;
    get.disabled = on;
    if (!on) { bar.value = 0; doing.replaceChildren(""); }
  }
  const chosen = () => current.features.filter((f) => f.on).map((f) => [f.latent, f.weight * f.times]);

  let asked = 0, busy = false;
  async function follow() {
    asked += 1;
    if (busy) return;
    busy = true;
    for (let done = 0; done !== asked;) {
      done = asked;
      const reply = await ask({ what: "loss", features: chosen(), bias: current.bias });
      if (reply.error) complain(reply.error);
      else result.querySelector('[data-field="loss"]').replaceChildren(number(reply.loss, 4));
    }
    busy = false;
  }

  function row(feature) {
    const on = el("input", { type: "checkbox", checked: true, "aria-label": `feature ${feature.latent} on` });
    const times = el("input", { type: "range", min: -1, max: 3, step: 0.05, value: 1, "aria-label": `weight of feature ${feature.latent}, times` });
    const shown = el("output", {}, "× 1.00");
    on.addEventListener("change", () => { feature.on = on.checked; times.disabled = !on.checked; follow(); });
    times.addEventListener("input", () => { feature.times = Number(times.value); shown.replaceChildren(`× ${number(feature.times)}`); follow(); });
    return el("div", { "data-latent": feature.latent }, on, el("span", {}, `${feature.latent}${feature.weight < 0 ? " (down)" : ""}`), times, shown);
  }

  function select(found, index) {
    const step = found.path[index];
    current = { bias: step.bias, features: step.features.map(([latent, weight]) => ({ latent, weight, on: true, times: 1 })) };
    const old = result.querySelector(".nbw-features");
    const rows = el("div", { class: "nbw-features", role: "group", "aria-label": "features" }, ...current.features.map(row));
    old ? old.replaceWith(rows) : result.append(rows);
    result.querySelector('[data-field="loss"]').replaceChildren(number(step.loss, 4));
  }

  function show(found) {
    const sizes = el("select", { "data-field": "size" });
    fill(sizes, found.path.map((s, i) => [i, `${s.features.length} features${s.validation == null ? "" : `, validation loss ${number(s.validation)}`}`]), Math.max(0, found.path.findIndex((s) => s.features.length <= 10)));
    sizes.addEventListener("change", () => select(found, sizes.value));
    const references = [`zero-shot ${number(found.zero_shot)}`, ...(found.few_shot === undefined ? [] : [`few-shot ${number(found.few_shot)}`])];
    result.replaceChildren(...(found.curve ? [chart(
      [{ name: "task vector", color: "#0072B2", points: found.curve.map((p) => [p.layer, p.task_vector]) },
        { name: "centred", color: "#56B4E9", points: found.curve.map((p) => [p.layer, p.centred]) },
        { name: "zero-shot", color: "#8A8A8A", dash: "4 3", points: found.curve.map((p) => [p.layer, found.zero_shot]) },
        { name: "few-shot", color: "#D55E00", dash: "2 3", points: found.curve.map((p) => [p.layer, found.few_shot]) }],
      { label: "Held-out loss of the vector added after each block", x: "layer", y: "loss (nats)", mark: found.layer, ticks: found.curve.map((p) => p.layer), title: "Held-out loss by layer" })] : []),
    el("p", {}, found.stopped ? "Stopped: the best so far. " : "", `After block ${found.layer}, on ${found.n_test} held-out pairs: `, el("strong", { "data-field": "loss", "aria-live": "polite" }), ` nats (${references.join(", ")}). Weights tuned here by hand are tuned on these pairs.`),
    field("Features kept", sizes));
    select(found, sizes.value);
    put.disabled = false;
  }

  const ask = line(model, (told) => {
    if (told.kind === "loading") status.replaceChildren("The kernel is loading the model …");
    if (told.kind === "refused") status.replaceChildren(`The kernel cannot clean: ${told.error}`);
    if (told.kind === "progress") { bar.max = told.of; bar.value = told.done; doing.replaceChildren(told.text); }
    if (told.kind === "failed") { working(false); complain(told.error); }
    if (told.kind === "cleaned") { working(false); show(told); }
    if (told.kind === "live" && box.dataset.mode !== "live") {
      box.dataset.mode = "live";
      status.replaceChildren(`Live: every number is computed by the kernel (${told.model}).`);
      fill(layer, told.layers.map((l) => [l, `after block ${l}`]), told.layers.includes(10) ? 10 : told.layers[0]);
      box.append(el("div", { class: "nbw-controls" },
        el("div", {}, field("Pairs, one x -> y a line, or JSON", pairs)),
        el("div", {}, field("Or the path of a task file", path), field("Layer", layer), field("Method", method), el("p", {}, start, stop), bar, doing)),
      problem, result,
      el("div", {}, field("Folder of the export", folder), put, get, files));
    }
  });
  start.addEventListener("click", async () => {
    complain();
    working(true);
    const reply = await ask({ what: "clean", pairs: pairs.value, path: path.value, layer: Number(layer.value), method: method.value });
    if (reply.error) { working(false); complain(reply.error); }
  });
  stop.addEventListener("click", () => ask({ what: "stop" }));
  put.addEventListener("click", async () => {
    complain();
    const reply = await ask({ what: "export", folder: folder.value, features: chosen(), bias: current.bias });
    if (reply.error) complain(reply.error);
    else files.replaceChildren(`Written to ${reply.folder}; loss ${number(reply.loss, 4)}.`);
  });
  get.addEventListener("click", async () => {
    complain();
    const reply = await ask({ what: "import", folder: folder.value });
    if (reply.error) return complain(reply.error);
    show(reply);
    files.replaceChildren(`Loaded ${reply.title}; its card says ${number(reply.card_loss, 4)} nats.`);
  });
  model.send({ what: "hello" });
}

export default { render };
