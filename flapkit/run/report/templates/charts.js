"use strict";
// Draws the figures of a report from the JSON in the page. Colours are CSS variables of the page, so that switching
// between light and dark does not redraw. Every value can be read by hovering, by touch and with the arrow keys.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const announcement = document.getElementById("announcement");
  const of = (rows, kind) => (rows || []).filter((row) => row.kind === kind);
  const percent = (value) => (value === null ? "–" : `${value.toFixed(1)} %`);
  const plural = (count, one, many) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
  const colour = (run) => `var(--run${figures.runs.indexOf(run) % 8})`;
  // There are eight colours: the ninth run and later ones are hollow and dashed.
  const repeats = (run) => figures.runs.indexOf(run) >= 8;
  const dash = (run) => (repeats(run) ? "4 3" : null);
  const dotOf = (run) => (repeats(run) ? { fill: "var(--card)", stroke: colour(run), strokeWidth: 2 } : { fill: colour(run) });
  const shortNumber = (value) =>
    value >= 1e9 ? `${value / 1e9} B` : value >= 1e6 ? `${value / 1e6} M` : value >= 1e3 ? `${value / 1e3} k` : `${value}`;

  // Layers to label on an axis with room for this many labels.
  function ticks(layers, room) {
    const all = [...new Set(layers)].sort((a, b) => a - b);
    const step = Math.ceil(all.length / Math.max(2, room));
    return all.filter((layer, index) => index % step === 0);
  }

  const base = (box) => ({
    width: box.clientWidth,
    height: box.clientHeight,
    marginLeft: 40,
    marginRight: 8,
    marginTop: 26,
    marginBottom: 44,
    style: { background: "none", overflow: "visible" },
  });
  const layerAxis = (rows, width) => ({
    label: "layer",
    labelArrow: "none",
    labelAnchor: "center",
    labelOffset: 34,
    tickSize: 0,
    ticks: ticks(rows.map((row) => row.layer), width / 26),
    tickFormat: String,
  });

  // A logarithmic axis has ticks at 1, 2 and 5 of each power of ten if there is room, else at the powers only.
  function scoreTicks(scale, low, high, width) {
    if (scale !== "log") return { ticks: 5 };
    const powers = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) powers.push(power);
    const all = (leading) => powers.flatMap((power) => leading.map((digit) => Number(`${digit}e${power}`))).filter((value) => value >= low && value <= high);
    const room = width / 62;
    const chosen = [[1, 2, 5], [1, 3], [1]].map(all).find((values) => values.length <= room) || all([1]).filter((value, index) => index % 2 === 0);
    return { ticks: chosen.length > 1 ? chosen : all([1, 2, 5]), tickFormat: (value) => (value >= 1e-3 && value < 1e4 ? `${value}` : value.toExponential(0).replace("e+", "e")) };
  }

  // Earlier runs are drawn wider, so that they are seen where later ones coincide with them.
  const wider = (run) => Math.min(2.5, 10 / figures.runs.length) * (figures.runs.length - 1 - figures.runs.indexOf(run));

  const domain = (rows) => [...new Set(rows.map((row) => row.layer))].sort((a, b) => a - b);

  // A tooltip.
  function tipped(rows, x, y, title, options = {}) {
    const pointer = options.pointer || Plot.pointerX;
    return Plot.tip(rows, pointer({ x, y, title, fill: "var(--card)", stroke: "var(--line)", textPadding: 10, lineHeight: 1.35, maxRadius: 80, ...options.channels }));
  }

  const charts = {
    structure(box) {
      if (figures.runs) return charts.structureOfRuns(box);
      const rows = of(figures.structure, box.dataset.kind);
      const title = (row) => `layer ${row.layer}\n${row.kept.toLocaleString("en")} of ${row.units.toLocaleString("en")} kept\n${percent(row.share)}`;
      const room = (box.clientWidth - 48) / rows.length;
      return {
        rows, title,
        plot: Plot.plot({
          ...base(box),
          x: { type: "band", domain: domain(rows), padding: rows.length > 40 ? 0.12 : 0.22, ...layerAxis(rows, box.clientWidth) },
          y: { domain: [0, 100], ticks: [0, 25, 50, 75, 100], tickSize: 0, label: "% kept", labelArrow: "none", nice: false },
          marks: [
            Plot.barY(rows, { x: "layer", y1: 0, y2: 100, fill: "var(--removed)", rx: 3 }),
            Plot.barY(rows, { x: "layer", y1: 0, y2: "share", fill: "var(--kept)", rx: 3 }),
            room > 30
              ? Plot.text(rows, { x: "layer", y: (row) => Math.max(row.share, 14), text: (row) => `${row.kept}`, dy: 12, fill: "var(--card)", fontWeight: 600, fontSize: 12 })
              : null,
            tipped(rows, "layer", "share", title),
          ],
        }),
      };
    },

    structureOfRuns(box) {
      const rows = of(figures.structure, box.dataset.kind);
      const title = (row) => `${row.run}\nlayer ${row.layer}: ${row.kept.toLocaleString("en")} of ${row.units.toLocaleString("en")} kept\n${percent(row.share)}`;
      return lines(box, rows, "share", title, { domain: [0, 100], label: "% kept" }, domain(rows));
    },

    scores(box) {
      const { scale, edges, bars, thresholds } = figures.scores[box.dataset.kind];
      const layers = domain(bars);
      const rows = bars.map((bar) => ({
        ...bar, from: edges[bar.bin], to: edges[bar.bin + 1], low: bar.removed / bar.most, high: (bar.removed + bar.kept) / bar.most,
        middle: scale === "log" ? Math.sqrt(edges[bar.bin] * edges[bar.bin + 1]) : (edges[bar.bin] + edges[bar.bin + 1]) / 2,
      }));
      const threshold = new Map(thresholds.map((entry) => [entry.layer, entry.value]));
      const short = (value) => value.toPrecision(3);
      const title = (row) =>
        `layer ${row.layer}, scores ${short(row.from)} to ${short(row.to)}\n${row.kept} kept, ${row.removed} removed` +
        (threshold.has(row.layer) ? `\nthreshold ${short(threshold.get(row.layer))}` : "");
      const labelled = new Set(ticks(layers, (box.clientHeight - 50) / 16));
      const lines = thresholds.map((entry) => ({ ...entry, at: Math.min(Math.max(entry.value, edges[0]), edges[edges.length - 1]) }));
      return {
        rows, title, fy: true,
        plot: Plot.plot({
          ...base(box),
          marginLeft: 34,
          marginTop: 4,
          x: { type: scale, domain: [edges[0], edges[edges.length - 1]], label: "score", labelAnchor: "center", labelOffset: 34, labelArrow: "none", tickSize: 0, ...scoreTicks(scale, edges[0], edges[edges.length - 1], box.clientWidth) },
          y: { domain: [0, 1], axis: null },
          fy: { domain: layers, label: null, padding: layers.length > 20 ? 0.12 : 0.22 },
          marks: [
            Plot.axisFy({ anchor: "left", label: null, tickFormat: (layer) => (labelled.has(layer) ? `${layer}` : ""), dx: 2 }),
            Plot.ruleY([0], { stroke: "var(--line)" }),
            Plot.rectY(rows, { fy: "layer", x1: "from", x2: "to", y1: 0, y2: "low", fill: "var(--gone)", insetLeft: 0.5, insetRight: 0.5 }),
            Plot.rectY(rows, { fy: "layer", x1: "from", x2: "to", y1: "low", y2: "high", fill: "var(--kept)", insetLeft: 0.5, insetRight: 0.5 }),
            Plot.ruleX(lines, { fy: "layer", x: "at", stroke: "var(--threshold)", strokeWidth: 2 }),
            tipped(rows, "middle", "high", title, { pointer: Plot.pointer, channels: { fy: "layer", maxRadius: 40 } }),
          ],
        }),
      };
    },

    errors(box) {
      const rows = of(figures.errors, box.dataset.kind);
      if (figures.runs) {
        const title = (row) => `${row.run}\n${row.site}\nalone ${percent(row.alone)}, in the model ${percent(row.in_model)}`;
        const layers = domain(of(figures.structure, box.dataset.kind));
        return lines(box, rows.filter((row) => row.in_model !== null), "in_model", title, { label: "% error in the model" }, layers);
      }
      const title = (row) => `${row.site}\npredicted ${percent(row.predicted)}\nmeasured alone ${percent(row.alone)}\nin the model ${percent(row.in_model)}`;
      const measured = rows.filter((row) => row.in_model !== null);
      const every = of(figures.structure, box.dataset.kind);
      const most = Math.max(...(figures.errors || []).flatMap((row) => [row.predicted || 0, row.alone, row.in_model || 0]));
      const size = rows.length > 40 ? 2.5 : 4;
      return {
        rows, title,
        plot: Plot.plot({
          ...base(box),
          x: { type: "point", domain: domain(every), padding: 0.5, ...layerAxis(every, box.clientWidth) },
          y: { domain: [0, most * 1.06], grid: true, tickSize: 0, ticks: 5, label: "% of the output", labelArrow: "none" },
          marks: [
            Plot.ruleY([0], { stroke: "var(--line)" }),
            Plot.link(measured, { x: "layer", y1: "alone", y2: "in_model", stroke: "var(--removed)", strokeWidth: 2 }),
            Plot.dot(measured, { x: "layer", y: "in_model", symbol: "diamond", r: size + 0.5, fill: "var(--in-model)" }),
            Plot.dot(rows, { x: "layer", y: "alone", r: size, fill: "var(--alone)" }),
            Plot.dot(rows.filter((row) => row.predicted !== null), { x: "layer", y: "predicted", r: size + 2.5, stroke: "var(--predicted)", strokeWidth: 1.5 }),
            tipped(rows, "layer", "alone", title),
          ],
        }),
      };
    },

    search(box) {
      const { at, measure, line, dots, rows, chosen, stairs, logarithmic } = figures.search;
      const title = (row) => `${at} ${row.at.toLocaleString("en")}\n${row.series}: ${row.value.toPrecision(4)}`;
      const main = rows.filter((row) => row.series === line);
      const [low, high] = [Math.min, Math.max].map((end) => end(...rows.map((row) => row.value)));
      return {
        rows, title,
        plot: Plot.plot({
          ...base(box),
          marginLeft: 52,
          marginRight: 20,
          x: { label: at, labelAnchor: "center", labelOffset: 34, labelArrow: "none", tickSize: 0, ticks: Math.max(3, box.clientWidth / 110), tickFormat: (value) => (Number.isInteger(value) ? value.toLocaleString("en") : ""), inset: 8 },
          y: { type: logarithmic ? "log" : "linear", grid: true, label: measure, labelArrow: "none", tickSize: 0, ticks: 5, nice: true, inset: 6, ...(low === high ? { domain: [0, 2 * high || 1] } : {}), ...(logarithmic ? { tickFormat: (value) => (/^0?[.0]*[125]/.test(String(value)) ? String(value) : "") } : {}) },
          marks: [
            Plot.dot(rows.filter((row) => row.series === dots), { x: "at", y: "value", r: 2.5, fill: "var(--gone)" }),
            Plot.line(main, { x: "at", y: "value", stroke: "var(--kept)", strokeWidth: 2, curve: stairs ? "step-after" : "linear" }),
            stairs ? null : Plot.dot(main, { x: "at", y: "value", r: 3.5, fill: "var(--kept)" }),
            Plot.dot(main.filter((row) => row.at === chosen), { x: "at", y: "value", symbol: "diamond", r: 5, fill: "var(--in-model)" }),
            tipped(rows, "at", "value", title, { pointer: Plot.pointer }),
          ],
        }),
      };
    },

    zero_shot(box) {
      const whole = figures.zero_shot;
      const sides = figures.runs
        ? whole.flatMap((row, index) => [
            ...(whole.findIndex((other) => other.task === row.task) === index ? [{ task: row.task, who: "dense", value: row.dense, error: row.dense_error, fill: "var(--dense)" }] : []),
            { task: row.task, who: row.run, value: row.pruned, error: row.pruned_error, fill: colour(row.run) },
          ])
        : whole.flatMap((row) => [
            { task: row.task, who: "dense", value: row.dense, error: row.dense_error, fill: "var(--dense)" },
            { task: row.task, who: "pruned", value: row.pruned, error: row.pruned_error, fill: "var(--pruned)" },
          ]);
      const rows = sides.map((row) => ({ ...row, low: row.value - 1.96 * (row.error || 0), high: row.value + 1.96 * (row.error || 0) }));
      const title = (row) => `${row.task}, ${row.who}\n${row.value.toFixed(1)} % ± ${(row.error || 0).toFixed(1)}`;
      return {
        rows, title, fy: "task",
        plot: Plot.plot({
          ...base(box),
          marginLeft: 108,
          marginRight: 44,
          x: { domain: [0, Math.min(100, Math.max(...rows.map((row) => row.high)) * 1.05)], grid: true, tickSize: 0, label: "% correct", labelAnchor: "center", labelArrow: "none" },
          y: { type: "band", domain: figures.runs ? ["dense", ...figures.runs] : ["dense", "pruned"], axis: null, padding: 0.12 },
          fy: { domain: [...new Set(rows.map((row) => row.task))], label: null, padding: 0.2 },
          marks: [
            Plot.axisFy({ anchor: "left", label: null, fill: "var(--ink)", fontSize: 12 }),
            Plot.barX(rows, { fy: "task", y: "who", x1: 0, x2: "value", fill: "fill", rx: 2 }),
            Plot.link(rows, { fy: "task", y: "who", x1: "low", x2: "high", stroke: "var(--ink)", strokeWidth: 1.5 }),
            Plot.tickX(rows, { fy: "task", y: "who", x: "low", stroke: "var(--ink)", strokeWidth: 1.5, insetTop: 4, insetBottom: 4 }),
            Plot.tickX(rows, { fy: "task", y: "who", x: "high", stroke: "var(--ink)", strokeWidth: 1.5, insetTop: 4, insetBottom: 4 }),
            Plot.text(rows, { fy: "task", y: "who", x: "high", text: (row) => row.value.toFixed(1), dx: 6, textAnchor: "start", fill: "var(--muted)" }),
            tipped(rows, "value", "who", title, { pointer: Plot.pointerY, channels: { fy: "task" } }),
          ],
        }),
      };
    },

    tradeoff(box) {
      const rows = figures.tradeoff.filter((row) => row.text === box.dataset.kind);
      const dense = [...new Map(rows.filter((row) => row.which === "dense").map((row) => [`${row.model} ${row.params}`, row])).values()];
      const pruned = rows.filter((row) => row.which === "pruned");
      const title = (row) => `${row.which === "dense" ? `${row.model}, dense` : row.run}\n${row.params.toLocaleString("en")} parameters\nperplexity ${row.perplexity.toPrecision(4)}`;
      const shown = [...dense, ...pruned];
      const values = shown.map((row) => row.perplexity);
      const logarithmic = Math.max(...values) > 8 * Math.min(...values);
      return {
        rows: shown, title,
        plot: Plot.plot({
          ...base(box),
          marginLeft: 52,
          marginRight: 20,
          x: { label: "parameters", labelAnchor: "center", labelOffset: 34, labelArrow: "none", tickSize: 0, nice: true, ticks: Math.max(3, box.clientWidth / 110), tickFormat: shortNumber, inset: 8 },
          y: { type: logarithmic ? "log" : "linear", grid: true, label: "perplexity", labelArrow: "none", tickSize: 0, ticks: 5, nice: true, inset: 6, ...(logarithmic ? { tickFormat: (value) => (/^[125]/.test(String(value)) ? String(value) : "") } : {}) },
          marks: [
            Plot.dot(dense, { x: "params", y: "perplexity", r: 6, stroke: "var(--dense)", strokeWidth: 2.5 }),
            ...figures.runs.map((run) => Plot.dot(pruned.filter((row) => row.run === run), { x: "params", y: "perplexity", r: 5 + wider(run), ...dotOf(run) })),
            tipped(shown, "params", "perplexity", title, { pointer: Plot.pointer }),
          ],
        }),
      };
    },
  };

  // A line for each run, which joins neighbouring layers alone.
  function lines(box, rows, y, title, options, layers) {
    const known = (run) => new Map(rows.filter((row) => row.run === run).map((row) => [row.layer, row[y]]));
    const joined = (run) => ((values) => layers.map((layer) => ({ layer, value: values.has(layer) ? values.get(layer) : NaN })))(known(run));
    return {
      rows, title, y,
      plot: Plot.plot({
        ...base(box),
        x: { type: "point", domain: layers, padding: 0.5, ...layerAxis(layers.map((layer) => ({ layer })), box.clientWidth) },
        y: { grid: true, tickSize: 0, ticks: 5, labelArrow: "none", zero: true, ...options },
        marks: [
          ...figures.runs.flatMap((run) => [
            Plot.line(joined(run), { x: "layer", y: "value", stroke: colour(run), strokeWidth: 2 + wider(run), strokeDasharray: dash(run) }),
            Plot.dot(rows.filter((row) => row.run === run), { x: "layer", y, r: 3.5 + wider(run) / 1.5, ...dotOf(run) }),
          ]),
          tipped(rows, "layer", y, title, { pointer: Plot.pointer }),
        ],
      }),
    };
  }

  // The arrow keys select a value: its tooltip is shown as on hovering, and a screen reader reads its text.
  function keys(box) {
    box.addEventListener("keydown", (event) => {
      const drawn = box.drawn;
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!drawn || !drawn.rows.length || !(step || event.key === "Escape")) return;
      event.preventDefault();
      if (!step) {
        point(box, "pointerleave", 0, 0);
        announcement.textContent = "";
        return;
      }
      const last = box.at === undefined ? (step > 0 ? -1 : 0) : box.at;
      box.at = (last + step + drawn.rows.length) % drawn.rows.length;
      const row = drawn.rows[box.at];
      const mark = places(drawn)[box.at];
      if (mark) point(box, "pointermove", mark.x, mark.y);
      announcement.textContent = drawn.title(row).replaceAll("\n", ", ");
    });
    box.addEventListener("blur", () => point(box, "pointerleave", 0, 0));
  }

  // The position of each row, in pixels of the drawing.
  function places({ plot, rows, fy, y }) {
    const scale = (name) => plot.scale(name);
    const middle = (name, value) => scale(name).apply(value) + (scale(name).bandwidth || 0) / 2;
    return rows.map((row) => {
      if (fy === "task") return { x: middle("x", row.value), y: scale("fy").apply(row.task) + middle("y", row.who) };
      if (fy) return { x: middle("x", row.middle), y: scale("fy").apply(row.layer) + middle("y", row.high) };
      if (row.at !== undefined) return { x: middle("x", row.at), y: middle("y", row.value) };
      if (row.params !== undefined) return { x: middle("x", row.params), y: middle("y", row.perplexity) };
      return { x: middle("x", row.layer), y: middle("y", row[y || (row.share === undefined ? "alone" : "share")]) };
    });
  }

  function point(box, kind, x, y) {
    const svg = box.querySelector("svg");
    if (!svg) return;
    const at = svg.getBoundingClientRect();
    const zoom = at.width / svg.viewBox.baseVal.width;
    svg.dispatchEvent(new PointerEvent(kind, { bubbles: true, pointerType: "mouse", clientX: at.left + x * zoom, clientY: at.top + y * zoom }));
  }

  function draw(box) {
    if (!box.clientWidth || box.clientWidth === box.width) return;
    box.width = box.clientWidth;
    box.drawn = charts[box.dataset.chart](box);
    box.drawn.plot.setAttribute("aria-hidden", "true");
    box.replaceChildren(box.drawn.plot);
  }

  const boxes = [...document.querySelectorAll("[data-chart]")];
  const seen = new ResizeObserver((entries) => entries.forEach((entry) => draw(entry.target)));
  for (const box of boxes) {
    draw(box);
    keys(box);
    seen.observe(box);
  }

  // Print with all details open.
  const closed = [];
  window.addEventListener("beforeprint", () => {
    const details = [...document.querySelectorAll("details:not([open])")];
    details.forEach((element) => (element.open = true));
    closed.push(...details);
  });
  window.addEventListener("afterprint", () => closed.splice(0).forEach((element) => (element.open = false)));
})();
