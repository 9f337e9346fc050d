"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const tip = document.getElementById("tip");
  const names = JSON.parse(document.getElementById("agents").textContent);

  // Light or dark: what the system says, until the reader chooses.
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const paint = () => { root.dataset.theme = chosen ?? (system.matches ? "dark" : "light"); };
  system.addEventListener("change", paint);
  document.getElementById("theme").addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    paint();
  });
  paint();

  // Show and hide agents everywhere at once.
  const off = new Set();
  const show = () => {
    for (const node of all("[data-agent]")) {
      node.toggleAttribute("hidden", off.has(node.dataset.agent) || off.has(node.dataset.rival));
      if (node instanceof SVGElement) node.style.display = node.hasAttribute("hidden") ? "none" : "";
    }
    for (const chip of all(".chip")) chip.setAttribute("aria-pressed", String(!off.has(chip.value)));
  };
  for (const chip of all(".chip")) {
    chip.addEventListener("click", () => {
      if (!off.delete(chip.value)) off.add(chip.value);
      show();
    });
    chip.addEventListener("dblclick", () => {  // only this one; again: all
      const others = all(".chip").map((one) => one.value).filter((value) => value !== chip.value);
      const alone = others.every((value) => off.has(value)) && !off.has(chip.value);
      off.clear();
      if (!alone) others.forEach((value) => off.add(value));
      show();
    });
  }

  // Choices between two views of the same thing: <div class="choice"> before views with data-view.
  for (const choice of all(".choice")) {
    const views = all("[data-view]", choice.parentElement);
    const pick = (value) => {
      for (const button of all("button", choice)) button.setAttribute("aria-pressed", String(button.value === value));
      for (const view of views) view.toggleAttribute("hidden", view.dataset.view !== value);
    };
    for (const button of all("button", choice)) button.addEventListener("click", () => pick(button.value));
    pick(choice.querySelector("button").value);
  }

  const place = (event) => {
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 16 : event.clientX + 16;
    tip.style.left = `${Math.max(6, left)}px`;
    tip.style.top = `${Math.min(innerHeight - box.height - 6, event.clientY + 14)}px`;
  };
  const number = (value) => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
  const line = (text, agent) => {
    const row = document.createElement("div");
    if (agent !== undefined) {
      const mark = document.createElement("i");
      mark.className = `c${agent % 8}`;
      row.append(mark);
    }
    row.append(text);
    return row;
  };

  // Line charts: the point of every shown line that is nearest to the pointer.
  for (const chart of all("svg[data-chart]")) {
    const data = JSON.parse(chart.dataset.chart);
    const cursor = chart.querySelector(".cursor");
    const [left, right] = data.box;
    const move = (event) => {
      const box = chart.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
      const x = data.x[0] + (Math.min(Math.max(at, left), right) - left) / (right - left) * (data.x[1] - data.x[0]);
      const rows = [];
      let nearest = null;
      for (const one of data.series) {
        if (off.has(String(one.agent))) continue;
        let k = 0;
        one.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(one.x[k] - x)) k = i; });
        if (nearest === null || Math.abs(one.x[k] - x) < Math.abs(nearest - x)) nearest = one.x[k];
        const range = one.low ? ` (${number(one.low[k])} to ${number(one.high[k])})` : "";
        rows.push([one.y[k], line(`${names[one.agent]}: ${number(one.y[k])}${range}`, one.agent)]);
      }
      if (nearest === null) return;
      const px = left + (nearest - data.x[0]) / (data.x[1] - data.x[0]) * (right - left);
      cursor.setAttribute("x1", px);
      cursor.setAttribute("x2", px);
      cursor.setAttribute("visibility", "visible");
      rows.sort((a, b) => b[0] - a[0]);
      tip.replaceChildren(line(`${data.xLabel}: ${number(nearest)}`), ...rows.map((row) => row[1]));
      place(event);
    };
    const leave = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
    chart.addEventListener("pointermove", move);
    chart.addEventListener("pointerdown", move);
    chart.addEventListener("pointerleave", leave);
  }

  // Everything else that has something to say.
  for (const node of all("[data-tip]")) {
    node.addEventListener("pointermove", (event) => { tip.replaceChildren(line(node.dataset.tip)); place(event); });
    node.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
