"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const units = { step: "step", tokens: "tokens", flops: "training FLOPs", hours: "hours" };
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const drawn = new Map(); // chart id -> { chart, div, steps: x of every trace in steps }
  const byId = (id) => document.getElementById(id);
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  let unit = "step", logarithmic = false, moving = false;

  // -- colours -----------------------------------------------------------------------------------------------

  function themed() {
    // An automatic margin in both directions may never settle: a label at the edge comes and goes with it.
    const axis = (own, automargin) => Object.assign({ gridcolor: color("--grid"), linecolor: color("--line"), zerolinecolor: color("--grid"), automargin }, own);
    return (layout) => Object.assign({}, layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: color("--text"), family: "system-ui, sans-serif", size: 12 },
      margin: { l: 60, r: 20, t: 8, b: 44 },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
      hoverlabel: { bgcolor: color("--card"), font: { color: color("--text") }, namelength: 40 },
      xaxis: axis(layout.xaxis, "height"), yaxis: axis(layout.yaxis, "width"),
    });
  }

  function repaint() {
    const paint = themed();
    for (const { div, chart } of drawn.values()) {
      const shown = paint(chart.layout), range = (axis) => (div.layout[axis].autorange ? {} : { range: div.layout[axis].range, autorange: false });
      shown.xaxis = Object.assign(shown.xaxis, xaxis(chart), range("xaxis"));
      shown.yaxis = Object.assign(shown.yaxis, range("yaxis"));
      Plotly.react(div, div.data, shown, config);
    }
  }

  // -- the x axis --------------------------------------------------------------------------------------------

  function convert(run, steps) {
    const table = data.axes[run];
    if (unit === "step" || !table || !table[unit]) return steps;
    const from = table.step, to = table[unit];
    return steps.map((s) => {
      let low = 0, high = from.length - 1;
      if (high < 1) return to[0];
      while (high - low > 1) { const m = (low + high) >> 1; if (from[m] <= s) low = m; else high = m; }
      return to[low] + ((s - from[low]) / (from[high] - from[low])) * (to[high] - to[low]);
    });
  }

  function xaxis(chart) {
    return chart.over_steps ? { title: { text: units[unit] }, type: logarithmic ? "log" : "linear" } : {};
  }

  function rescale() {
    for (const { chart, div, steps } of drawn.values()) {
      if (!chart.over_steps) continue;
      Plotly.restyle(div, { x: div.data.map((trace, i) => convert(trace.meta, steps[i])) });
      Plotly.relayout(div, { "xaxis.title.text": units[unit], "xaxis.type": logarithmic ? "log" : "linear", "xaxis.autorange": true, "yaxis.autorange": true });
    }
  }

  function follow(source, change) { // zoom one, zoom all that share the axis
    if (moving) return;
    const left = change["xaxis.range[0]"], right = change["xaxis.range[1]"], whole = change["xaxis.autorange"];
    if (left === undefined && !whole) return;
    moving = true;
    const others = [...drawn.values()].filter(({ chart, div }) => chart.over_steps && div !== source);
    Promise.all(others.map(({ div }) => Plotly.relayout(div, whole ? { "xaxis.autorange": true } : { "xaxis.range": [left, right] }))).finally(() => { moving = false; });
  }

  // -- charts ------------------------------------------------------------------------------------------------

  function heightOf(chart, width) { // the legend stands above the curves, and must not take their room
    const names = chart.data.filter((trace) => trace.showlegend !== false).map((trace) => (trace.name || "").length);
    const columns = Math.max(1, Math.floor(width / (44 + 6 * Math.max(0, ...names))));
    return 300 + 30 * Math.max(0, Math.ceil(names.length / columns) - 2);
  }

  function draw(chart) {
    const div = byId(chart.id);
    chart.layout.height = heightOf(chart, div.clientWidth);
    const layout = themed()(chart.layout);
    layout.xaxis = Object.assign(layout.xaxis, xaxis(chart));
    return Plotly.newPlot(div, chart.data, layout, config).then(() => {
      drawn.set(chart.id, { chart, div, steps: chart.data.map((trace) => trace.x) });
      if (chart.over_steps) div.on("plotly_relayout", (change) => follow(div, change));
      div.addEventListener("keydown", (event) => walk(event, div));
    });
  }

  const position = new Map();
  function walk(event, div) { // left and right: points; up and down: curves
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] }[event.key];
    const curves = div.data.map((trace, i) => i).filter((i) => div.data[i].visible !== "legendonly" && div.data[i].hoverinfo !== "skip");
    if (!move || !curves.length) return;
    event.preventDefault();
    let [curve, point] = position.get(div) || [0, -1];
    curve = (curve + move[0] + curves.length) % curves.length;
    const trace = div.data[curves[curve]];
    point = Math.max(0, Math.min(trace.x.length - 1, point + move[1]));
    position.set(div, [curve, point]);
    try { Plotly.Fx.hover(div, [{ curveNumber: curves[curve], pointNumber: point }]); } catch (error) { /* outside of the zoom */ }
    const name = new DOMParser().parseFromString(trace.name || "", "text/html").body.textContent;
    byId("live").textContent = `${name}: x ${trace.x[point]}, y ${trace.text ? trace.text[point] : trace.y[point]}`;
  }

  // -- maps --------------------------------------------------------------------------------------------------

  function drawFrames(frames) {
    const figure = document.querySelector(`[data-frames="${frames.id}"]`), div = byId(`${frames.id}-map`);
    const select = figure.querySelector(".quantity"), time = figure.querySelector(".time"), shown = figure.querySelector("output");
    const layout = { height: Math.max(220, 90 + 26 * frames.kinds.length), xaxis: { title: { text: "layer" }, type: "category" }, yaxis: { type: "category", autorange: "reversed" } };
    const chart = { id: `${frames.id}-map`, layout, data: [], over_steps: false };
    function trace() {
      const all = frames.values[select.value], flat = all.flat(2).filter((v) => v !== null);
      const z = all[+time.value], zmin = Math.min(...flat), zmax = Math.max(...flat);
      return { type: "heatmap", x: frames.depths, y: frames.kinds, z, zmin, zmax, showscale: zmin < zmax, colorscale: "Viridis", hoverongaps: false,
        hovertemplate: "layer %{x}<br>%{y}<br>%{z:.4g}<extra></extra>", colorbar: { thickness: 12 },
        text: z.map((row) => row.map((v) => (v === null ? "" : +v.toPrecision(3)))), texttemplate: frames.depths.length <= 16 ? "%{text}" : "" };
    }
    function update() {
      shown.value = frames.steps[+time.value];
      time.setAttribute("aria-valuetext", `step ${frames.steps[+time.value]}`);
      if (drawn.has(chart.id)) Plotly.react(div, [trace()], div.layout, config);
    }
    select.addEventListener("change", update);
    time.addEventListener("input", update);
    return Plotly.newPlot(div, [trace()], themed()(layout), config).then(() => { drawn.set(chart.id, { chart, div, steps: [frames.depths] }); update(); });
  }

  // -- tables ------------------------------------------------------------------------------------------------

  function ready(box) {
    const body = box.querySelector("tbody"), heads = [...box.querySelectorAll("th")], count = box.querySelector(".count");
    const value = (row, i) => row.cells[i].dataset.value;
    function tell() {
      const rows = [...body.rows], seen = rows.filter((row) => !row.hidden).length;
      count.textContent = seen === rows.length ? `${seen} rows` : `${seen} of ${rows.length} rows`;
    }
    heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const numeric = head.classList.contains("number");
      body.append(...[...body.rows].sort((a, b) => {
        const x = value(a, i), y = value(b, i);
        if (x === "" || y === "") return (x === "") - (y === ""); // what is missing stands last
        return sign * (numeric ? x - y : x.localeCompare(y));
      }));
    }));
    box.querySelector(".filter").addEventListener("input", (event) => {
      const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of body.rows) { const text = row.textContent.toLowerCase(); row.hidden = !words.every((word) => text.includes(word)); }
      tell();
    });
    box.querySelector(".csv").addEventListener("click", () => {
      // A spreadsheet would run a text that begins like a formula.
      const quoted = (text, numeric) => `"${(numeric || !/^[=+\-@\t\r]/.test(text) ? text : "'" + text).replace(/"/g, '""')}"`;
      const numeric = heads.map((head) => head.classList.contains("number"));
      const lines = [heads.map((head) => quoted(head.textContent.trim(), false))];
      for (const row of body.rows) if (!row.hidden) lines.push([...row.cells].map((cell, i) => quoted(cell.dataset.value, numeric[i])));
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([lines.map((line) => line.join(",")).join("\r\n") + "\r\n"], { type: "text/csv" }));
      link.download = `${box.dataset.name}.csv`;
      link.click();
      URL.revokeObjectURL(link.href);
    });
    tell();
  }

  // -- the page ----------------------------------------------------------------------------------------------

  document.querySelectorAll(".table").forEach(ready);
  const listen = (id, event, act) => { if (byId(id)) byId(id).addEventListener(event, act); };
  listen("unit", "change", (event) => { unit = event.target.value; rescale(); });
  listen("logx", "change", (event) => { logarithmic = event.target.checked; rescale(); });
  listen("reset", "click", rescale);
  listen("theme", "click", () => {
    const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = (root.dataset.theme || (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
    repaint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  matchMedia("print").addEventListener("change", repaint);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));

  const jobs = [...data.charts.map((chart) => () => draw(chart)), ...data.frames.map((frames) => () => drawFrames(frames))];
  (async function () { // one after the other, so that the page answers meanwhile
    for (const job of jobs) { await job(); await new Promise((next) => setTimeout(next)); }
    document.documentElement.dataset.drawn = String(drawn.size);
  })();
})();
