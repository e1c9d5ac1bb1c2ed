"use strict";
const at = (id) => document.getElementById(id);
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
let shown = -1;

async function picture(number) {
  const response = await fetch(`/picture?${number}`, { cache: "no-store" });
  if (!response.ok) return;
  const url = URL.createObjectURL(await response.blob());
  const before = at("picture").src;
  at("picture").src = url;
  if (before.startsWith("blob:")) URL.revokeObjectURL(before);
}

async function show() {
  const view = await (await fetch("/view", { cache: "no-store" })).json();
  at("about").textContent = view.about;
  if (view.number !== shown && view.number > 0) {
    shown = view.number;
    await picture(view.number);
    at("smoothed").textContent = view.smoothed;
    at("label").textContent = view.label;
    at("probability").value = view.probability;
    at("percent").textContent = `${(100 * view.probability).toFixed(1)} %`;
    at("fps").textContent = view.fps.toFixed(1);
    at("latency").textContent = `${view.latency_ms.map((ms) => ms.toFixed(1)).join(" / ")} ms`;
    at("number").textContent = view.number;
  }
  at("dropped").textContent = view.dropped;
  at("trouble").textContent = view.trouble || (view.ended ? "slimray live has ended" : "");
  return view.ended;
}

(async () => {
  for (;;) {
    try {
      if (await show()) return;
    } catch (error) {
      at("trouble").textContent = "slimray live has ended";
      return;
    }
    await pause(100);
  }
})();
