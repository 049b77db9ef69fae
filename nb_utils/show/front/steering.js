// Steer one feature. Without a kernel the numbers come from the grid in `data`; with one they are computed.

function bars(view, color) {
  return el("ol", { class: "nbw-bars" }, ...view.tokens.map((token, i) =>
    el("li", {},
      el("code", {}, visible(token)),
      el("span", { class: "nbw-bar", "aria-hidden": "true" }, el("i", { style: `width:${100 * view.shares[i]}%;background:${color}` })),
      el("span", { class: "nbw-share" }, `${(100 * view.shares[i]).toFixed(1)} %`))));
}

function evidenceOf(found, elsewhere, titles) {
  const parts = [];
  if (found) {
    if (found.label) parts.push(el("p", {}, "Label: ", el("strong", {}, visible(found.label))));
    parts.push(el("p", {}, `Fires on ${(100 * found.density).toPrecision(2)} % of tokens; largest activation ${Math.round(found.max_activation)}.`));
    if (found.promoted.length) parts.push(el("p", {}, "Promotes: ", ...found.promoted.slice(0, 8).flatMap((t) => [el("code", {}, visible(t)), " "])));
    if (found.suppressed.length) parts.push(el("p", {}, "Suppresses: ", ...found.suppressed.slice(0, 8).flatMap((t) => [el("code", {}, visible(t)), " "])));
    if (found.examples.length) {
      parts.push(el("p", {}, "Fires most on (token marked):"), el("ul", { class: "nbw-examples" }, ...found.examples.map((e) =>
        el("li", {}, `…${e.before}`, el("mark", {}, e.token), `${e.after}… `, el("small", {}, `${Math.round(e.activation)}, ${e.source}`)))));
    }
  } else parts.push(el("p", {}, "No text evidence is stored for this direction."));
  const helped = Object.entries(elsewhere ?? {});
  if (helped.length) {
    parts.push(el("p", {}, "Best mean loss on test prompts, by task:"), el("ul", {}, ...helped.map(([task, [scale, loss, zero]]) =>
      el("li", {}, `${titles[task] ?? task}: ${number(loss)} at scale ${number(scale)}, unsteered ${number(zero)} (${loss < zero ? "helps" : "does not help"})`))));
  }
  return parts;
}

function render({ model, el: root }) {
  hideWords(model);
  const data = JSON.parse(model.get("data"));
  const titles = Object.fromEntries(data.tasks.map((t) => [t.name, t.title]));
  let live = null; // what the kernel said it can do
  let shown = { task: data.tasks.find((t) => t.name in data.zero)?.name ?? data.tasks[0]?.name, layer: null, latent: null, example: 0, scale: 0.3 };

  const status = el("p", { class: "nbw-status", role: "status" });
  const problem = el("p", { class: "nbw-error", role: "alert", hidden: true });
  const task = el("select", { "data-field": "task" });
  const example = el("select", { "data-field": "example" });
  const layer = el("select", { "data-field": "layer" });
  const ticks = el("p", { class: "nbw-ticks", "data-field": "ticks" });
  const search = el("input", { type: "search", placeholder: "number, method, label or token", "data-field": "search" });
  const features = el("select", { size: 7, "data-field": "feature" });
  const latent = el("input", { type: "number", min: 0, step: 1, "data-field": "latent" });
  const scale = el("input", { type: "range", min: 0, step: 1, "data-field": "scale" });
  const scaleText = el("output", { "data-field": "scale-text" });
  const prompt = el("textarea", { rows: 2, placeholder: "hot ->", "data-field": "prompt" });
  const answer = el("input", { type: "text", placeholder: "cold", "data-field": "answer" });
  const own = el("div", { class: "nbw-own", hidden: true }, field("Prompt, ending in ->", prompt), field("Expected answer (may be empty)", answer));
  const anyLatent = field("Or any latent", latent);
  anyLatent.hidden = true;
  const results = el("div", { class: "nbw-results", "aria-live": "polite" });
  const curve = el("div");
  const evidence = el("details", { open: true }, el("summary", {}, "What this feature responds to"));
  const evidenceBody = el("div");
  evidence.append(evidenceBody);

  // On a page of the book the address says what is shown, once a hand has moved something: a link leads back to it.
  function recall() {
    const said = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
    const found = data.cells[`${said.task}|${said.block}|${said.feature}`];
    if (!("page" in root.dataset) || !found) return false;
    const at = found.views[0][Number(said.example)] ? Number(said.example) : 0, strength = Number(said.scale);
    shown = { task: said.task, layer: Number(said.block), latent: Number(said.feature), example: at,
      scale: Number.isFinite(strength) ? strength : shown.scale };
    return true;
  }
  function remember() {
    if (!("page" in root.dataset) || !cell()) return;
    const { task, layer: block, latent: feature, scale, example } = shown;
    history.replaceState(null, "", `#${new URLSearchParams({ task, block, feature, scale, example })}`);
  }

  const entry = () => data.tasks.find((t) => t.name === shown.task);
  const cell = () => data.cells[`${shown.task}|${shown.layer}|${shown.latent}`];
  const scales = () => (live ? live.scales : data.scales);
  const nearest = (value) => scales().reduce((best, s, i) => (Math.abs(s - value) < Math.abs(scales()[best] - value) ? i : best), 0);
  const isOwn = () => shown.example === "own";

  function listTasks() {
    const listed = data.tasks.filter((t) => live || t.name in data.zero);
    fill(task, listed.map((t) => [t.name, t.title]), shown.task);
    listLayers();
  }
  function listLayers() {
    const found = Object.keys(entry().features).map(Number).filter((l) => live || data.tasks.length && entry().features[l].some((f) => `${shown.task}|${l}|${f.latent}` in data.cells));
    const all = (live ? live.layers : found).slice().sort((a, b) => a - b);
    if (!all.includes(shown.layer)) shown.layer = all.includes(8) ? 8 : all[0];
    fill(layer, all.map((l) => [l, `after block ${l}`]), shown.layer);
    fill(example, [...entry().examples.map(([x, y], i) => [i, `${x} ->   (answer: ${y})`]), ...(live ? [["own", "type your own …"]] : [])], shown.example);
    own.hidden = !isOwn();
    ticks.replaceChildren(data.ticks?.[shown.task] ?? "");
    listFeatures();
  }
  function listFeatures(keep = true) {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const all = (entry().features[shown.layer] ?? []).filter((f) => live || `${shown.task}|${shown.layer}|${f.latent}` in data.cells);
    const described = all.map((f) => {
      const known = data.evidence[`${shown.layer}:${f.latent}`];
      const name = f.latent < 0 ? "all pruned features together" : `feature ${f.latent}`;
      const tokens = known?.label ? ` · ${visible(known.label)}` : known?.promoted?.length ? ` · ${known.promoted.slice(0, 3).map(visible).join(" ")}` : "";
      return [f.latent, f.latent < 0 ? name : `${name} · ${f.method}, weight ${number(f.weight)}${tokens}`, `${name} ${f.method} ${known?.label ?? ""} ${(known?.promoted ?? []).join(" ")}`.toLowerCase()];
    });
    const found = described.filter(([, , text]) => words.every((w) => text.includes(w)));
    if (keep && shown.latent === null && found.length) shown.latent = found[0][0];
    if (!live && found.length && !found.some(([f]) => f === shown.latent)) shown.latent = found[0][0];
    fill(features, found.map(([value, text]) => [value, text]), shown.latent);
    if (!found.length) features.append(el("option", { disabled: true }, words.length ? "nothing found" : "no listed features here: type a latent"));
    listScales();
  }
  function listScales() {
    scale.max = scales().length - 1;
    scale.value = nearest(shown.scale);
    shown.scale = scales()[scale.value];
    latent.value = shown.latent >= 0 ? shown.latent : "";
    draw();
  }

  function show(before, after, mean) {
    const losses = (v) => (v?.loss == null ? "–" : number(v.loss));
    const rank = (v) => (v?.rank == null ? "–" : String(v.rank));
    const row = (name, a, b, key) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { "data-field": `${key}-before` }, a), el("td", { "data-field": `${key}-after` }, b));
    results.replaceChildren(
      el("div", { class: "nbw-pair" },
        el("section", {}, el("h4", {}, "Next token, unsteered"), bars(before, "#8A8A8A")),
        el("section", {}, el("h4", {}, "Next token, steered"), bars(after, "#0072B2"))),
      el("div", { class: "nbw-scroll", tabindex: "0" }, el("table", { class: "nbw-numbers" },
        el("thead", {}, el("tr", {}, el("td"), el("th", { scope: "col" }, "unsteered"), el("th", { scope: "col" }, "steered"))),
        el("tbody", {},
          row("answer's loss (nats)", losses(before), losses(after), "loss"),
          row("answer's rank", rank(before), rank(after), "rank"),
          row("goes on", visible(before.continuation ?? "…"), visible(after.continuation ?? "…"), "continuation"),
          ...(mean ? [row(`mean loss, ${data.n_test} test prompts`, number(mean.zero), number(mean.loss), "mean"),
            row("first token right", `${Math.round(100 * mean.zero_accuracy)} %`, `${Math.round(100 * mean.accuracy)} %`, "accuracy")] : [])))));
  }

  function draw() {
    problem.hidden = true;
    scaleText.replaceChildren(`${number(shown.scale)} × mean residual norm`);
    scale.setAttribute("aria-valuetext", scaleText.textContent);
    const found = cell(), top = found && 1.3 * Math.max(...found.loss, data.zero[shown.task].loss);
    const random = (data.random[`${shown.task}|${shown.layer}`] ?? []).filter(([, loss]) => loss <= top); // not to squash the rest
    curve.replaceChildren(...(found ? [chart(
      [{ name: "steered", color: "#0072B2", points: found.scales.map((s, i) => [s, found.loss[i]]) },
        ...(random.length ? [{ name: "random directions, mean", color: "#A05A2C", dash: "2 3", points: random }] : []),
        { name: "unsteered", color: "#8A8A8A", dash: "4 3", points: [[found.scales[0], data.zero[shown.task].loss], [found.scales.at(-1), data.zero[shown.task].loss]] }],
      { label: `Mean loss on ${data.n_test} test prompts (precomputed)`, x: "scale", y: "loss (nats)", mark: shown.scale, ticks: [-0.5, 0, 0.5, 1],
        title: `Mean loss against scale, lowest ${number(Math.min(...found.loss))} nats` })] : []));
    if (live) return compute();
    if (!found) return results.replaceChildren("Nothing is precomputed for this choice.");
    const at = found.scales.indexOf(shown.scale), zero = found.scales.indexOf(0);
    const unpack = ([loss, rank, continuation, tokens, shares]) => ({ loss, rank, continuation, tokens: tokens.map((t) => data.tokens[t]), shares });
    const base = data.zero[shown.task];
    show(unpack(found.views[zero][shown.example]), unpack(found.views[at][shown.example]),
      { zero: base.loss, zero_accuracy: base.accuracy, loss: found.loss[at], accuracy: found.accuracy[at] });
    drawEvidence(data.evidence[`${shown.layer}:${shown.latent}`]);
  }
  function drawEvidence(found) {
    evidenceBody.replaceChildren(...evidenceOf(found, cell()?.elsewhere, titles));
  }

  // One question at a time, and always the newest: a dragged slider never queues up in the kernel.
  let asked = 0, busy = false;
  async function compute() {
    asked += 1;
    if (busy) return;
    busy = true;
    root.firstChild.setAttribute("aria-busy", "true");
    for (let done = 0; done !== asked;) {
      done = asked;
      const question = { task: shown.task, layer: shown.layer, latent: shown.latent, scale: shown.scale,
        ...(isOwn() ? { prompt: prompt.value, answer: answer.value } : { example: shown.example }) };
      const started = performance.now();
      const view = await ask({ ...question, what: "view" });
      if (done !== asked) continue;
      if (view.error) { fail(view.error); continue; }
      show(view.before, view.after, null);
      root.firstChild.dataset.milliseconds = Math.round(performance.now() - started);
      const mean = isOwn() ? null : await ask({ ...question, what: "mean" });
      if (done !== asked || mean?.error) continue;
      show(view.before, view.after, mean);
      const feature = `${shown.layer}:${shown.latent}`;
      if (!(feature in data.evidence)) data.evidence[feature] = (await ask({ ...question, what: "evidence" })).evidence;
      drawEvidence(data.evidence[feature]);
      if (done !== asked) continue;
      const further = await ask({ ...question, what: "continuation" });
      if (done !== asked || further.error) continue;
      view.before.continuation = further.before;
      view.after.continuation = further.after;
      show(view.before, view.after, mean);
      root.firstChild.dataset.whole = Math.round(performance.now() - started);
    }
    busy = false;
    root.firstChild.removeAttribute("aria-busy");
  }
  function fail(sentence) {
    problem.replaceChildren(sentence);
    problem.hidden = false;
    results.replaceChildren();
  }

  task.addEventListener("change", () => { shown = { ...shown, task: task.value, latent: null, example: isOwn() ? "own" : 0 }; listLayers(); });
  example.addEventListener("change", () => { shown.example = example.value === "own" ? "own" : Number(example.value); own.hidden = !isOwn(); draw(); });
  layer.addEventListener("change", () => { shown = { ...shown, layer: Number(layer.value), latent: null }; listFeatures(); });
  search.addEventListener("input", () => listFeatures());
  features.addEventListener("change", () => { shown.latent = Number(features.value); listScales(); });
  latent.addEventListener("change", () => { shown.latent = latent.value === "" ? null : Number(latent.value); features.value = String(shown.latent); draw(); });
  scale.addEventListener("input", () => { shown.scale = scales()[scale.value]; draw(); });
  prompt.addEventListener("input", draw);
  answer.addEventListener("input", draw);

  const grid = el("div", { class: "nbw-controls" },
    el("div", {}, field("Task", task), field("Prompt", example), own, field("Layer", layer), ticks),
    el("div", {}, field("Find a feature", search), field("Feature", features), anyLatent));
  const box = el("div", { class: "nbw", role: "group", "aria-label": "Steering control" },
    status, grid, field("Scale", el("span", { class: "nbw-slider" }, scale, scaleText)), problem, results, curve, evidence);
  root.append(box);
  for (const moved of ["input", "change"]) box.addEventListener(moved, remember);
  addEventListener("hashchange", () => { if (recall()) listTasks(); });

  const ask = line(model, (told) => {
    if (told.kind === "loading") status.replaceChildren("Precomputed; the kernel is loading the model …");
    if (told.kind === "refused") status.replaceChildren(`Precomputed: the kernel cannot compute (${told.error})`);
    if (told.kind === "live") {
      live = told;
      anyLatent.hidden = false;
      status.replaceChildren(`Live: every number is computed by the kernel (${told.model}).`);
      root.firstChild.dataset.mode = "live";
      listTasks();
    }
  });
  status.replaceChildren(`Precomputed: ${data.scales.length} scales of ${Object.keys(data.cells).length} directions, computed with ${data.model}. Run this page in JupyterLab (make lab) to type prompts and steer live.`);
  root.firstChild.dataset.mode = "precomputed";
  recall();
  if (shown.task) listTasks();
  else results.replaceChildren("Nothing is precomputed for this model: run python -m workflow.explore_grid.");
  model.send({ what: "hello" });
}

export default { render };
