// Say the values of a figure: where the mouse is, or where the arrow keys have gone.
function readable(figure) {
  const spots = [...figure.querySelectorAll("[data-value]")], picture = figure.querySelector("svg");
  if (!spots.length) return;
  const said = document.createElement("output");
  said.className = "nb-said";
  picture.after(said);
  let at = -1;
  const say = (spot) => {
    figure.querySelector(".nb-at")?.classList.remove("nb-at");
    spot?.classList.add("nb-at");
    said.textContent = spot?.dataset.value ?? "";
  };
  for (const spot of spots) spot.querySelector("title").remove(); // the browser's own words would stand beside ours
  picture.addEventListener("pointerover", (event) => say(event.target.closest("[data-value]")));
  picture.addEventListener("pointerleave", () => say(spots[at]));
  picture.setAttribute("tabindex", "0");
  picture.setAttribute("role", "group");
  picture.setAttribute("aria-roledescription", "figure whose values the arrow keys read");
  picture.addEventListener("blur", () => say((at = -1)));
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    at = (at + step + spots.length + (at < 0 && step < 0)) % spots.length;
    say(spots[at]);
  });
}

document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("figure.nb-values").forEach(readable));
