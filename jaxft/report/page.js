// Draws the curves of a report with plotly.js, which the page contains. The data is from document.py.
"use strict";

const THEMES = {
  light: { text: "#1b1f24", quiet: "#59636e", grid: "#e3e7eb", line: "#8c959f", ground: "#ffffff" },
  dark: { text: "#e8ebee", quiet: "#a3adb8", grid: "#2c333b", line: "#6b7682", ground: "#1d2228" },
};
const DASHES = [["dot", "solid"], ["dashdot", "dash"]]; // [quantity of the chart][held-out rows]
// of the runs after those that the palette has a colour for, by plotly.js and as text
const SYMBOLS = [
  ["circle", "●"], ["square", "■"], ["diamond", "◆"], ["cross", "✚"], ["triangle-up", "▲"], ["x", "✖"], ["star", "★"],
];
const FEW = 12; // each point of a curve this short gets a mark; a longer curve has at most as many marks
const PRINTED_WIDTH = 330; // pixels of a chart on paper, two in a row

const data = JSON.parse(document.getElementById("curves-data").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
// smoothing: null is each curve's own, which follows from its noise
const state = { hidden: new Set(), smoothing: null, logarithmic: false, printing: false, range: null };
const charts = []; // {div, chart}

function theme() {
  if (state.printing) return "light";
  return document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
}

// The exponential moving average, corrected for its start at 0 as in Adam; gaps stay gaps.
function smoothed(values, factor) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = factor * sum + (1 - factor) * value;
    weight = factor * weight + (1 - factor);
    return sum / weight;
  });
}

// Text in which plotly.js finds no markup.
function plainText(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
}

// The y axis of a chart where plotly.js would not choose it well: of the values at the steps that a zoom shows,
// and around a value that does not change.
function valueRange(chart, isLogarithmic) {
  const [from, to] = state.range || [-Infinity, Infinity];
  const seen = [];
  for (const curve of chart.curves) {
    if (state.hidden.has(curve.run)) continue;
    curve.x.forEach((x, i) => {
      if (curve.y[i] !== null && from <= x && x <= to) seen.push(curve.y[i]);
    });
  }
  if (!seen.length) return { autorange: true };
  const low = seen.reduce((a, b) => Math.min(a, b)), high = seen.reduce((a, b) => Math.max(a, b));
  if (!state.range && low !== high) return { autorange: true };
  const ends = isLogarithmic ? [Math.log10(low), Math.log10(high)] : [low, high];
  if (!ends[0] && !ends[1] && !isLogarithmic) return { range: [-0.06, 1] }; // most metrics are not negative
  const margin = 0.06 * (ends[1] - ends[0]) || 0.5 * Math.abs(ends[1]) || 1;
  return { range: [ends[0] - margin, ends[1] + margin] };
}

// Whether there are more runs than colours, so that symbols tell those of one colour apart.
function hasSymbols() {
  return data.runs.length > data.palettes.light.length;
}

function symbol(run) {
  return SYMBOLS[Math.floor(run / data.palettes.light.length) % SYMBOLS.length];
}

function labels(chart) {
  return [...new Set(chart.curves.map((curve) => curve.label))];
}

function colour(chart, curve) {
  const palette = data.palettes[theme()];
  if (data.runs.length > 1) return palette[curve.run % palette.length];
  return palette[(2 * labels(chart).indexOf(curve.label) + (curve.heldOut ? 1 : 0)) % palette.length];
}

function traces(chart) {
  const found = [];
  const hasHeldOut = chart.curves.some((curve) => curve.heldOut);
  for (const curve of chart.curves) {
    if (state.hidden.has(curve.run)) continue;
    const several = data.runs.length > 1;
    const parts = [several ? data.runs[curve.run] : "", curve.label, curve.rows];
    const name = plainText(parts.filter(Boolean).join(", "));
    const main = !hasHeldOut || curve.heldOut;
    const line = {
      color: colour(chart, curve),
      width: main ? 2.2 : 1.4,
      dash: DASHES[labels(chart).indexOf(curve.label) % 2][several && !main ? 0 : 1],
    };
    const few = curve.x.length < FEW;
    const trace = {
      type: "scatter", x: curve.x, y: curve.y, name, line, connectgaps: false,
      mode: few || hasSymbols() ? "lines+markers" : "lines",
      marker: { size: 6, symbol: symbol(several ? curve.run : 0)[0], maxdisplayed: FEW },
    };
    if (curve.bars.length) {
      const side = (end, sign) => curve.bars.map((bar, i) => (bar ? sign * (bar[end] - curve.y[i]) : 0));
      trace.error_y = {
        type: "data", symmetric: false, array: side(1, 1), arrayminus: side(0, -1), thickness: 1, width: 3,
        color: line.color,
      };
    }
    const factor = state.smoothing === null ? curve.smoothing : state.smoothing;
    if (factor > 0 && !few) {
      const faint = { color: line.color, width: 1 };
      found.push({ ...trace, line: faint, opacity: 0.25, hoverinfo: "skip", showlegend: false });
      trace.y = smoothed(curve.y, factor);
    }
    found.push(trace);
  }
  return found;
}

function layout(chart) {
  const colours = THEMES[theme()];
  const positive = chart.curves.every((curve) => curve.y.every((value) => value === null || value > 0));
  const isLogarithmic = state.logarithmic && positive;
  const axis = {
    gridcolor: colours.grid, linecolor: colours.line, zeroline: false, showline: true, ticks: "outside",
    tickcolor: colours.line, automargin: true,
  };
  const hasLegend = data.runs.length === 1 && chart.curves.length > 1;
  return {
    height: 300 + (hasLegend ? 20 * Math.max(0, chart.curves.length - 2) : 0),
    ...(state.printing ? { width: PRINTED_WIDTH } : { autosize: true }),
    margin: { l: 56, r: 10, t: 30, b: 44 },
    font: { family: "system-ui, 'DejaVu Sans', sans-serif", size: 12, color: colours.text },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    xaxis: {
      ...axis, title: { text: data.x, standoff: 6 },
      ...(state.range ? { range: [...state.range] } : { autorange: true }),
    },
    yaxis: {
      ...axis, title: { text: chart.unit, standoff: 6 }, type: isLogarithmic ? "log" : "linear",
      fixedrange: true, hoverformat: ".5~g", exponentformat: "e", ...valueRange(chart, isLogarithmic),
    },
    hovermode: "x unified",
    hoverlabel: { bgcolor: colours.ground, bordercolor: colours.line, namelength: -1, font: { color: colours.text } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colours.quiet, activecolor: colours.text },
    showlegend: hasLegend,
    legend: { orientation: "h", x: 0, y: -0.24, yanchor: "top" },
  };
}

const CONFIG = {
  responsive: true, displaylogo: false, doubleClick: false,
  // not plotly.js's own choice, which has a button that sends the chart to a server
  modeBarButtons: [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
};

function draw() {
  return Promise.all(charts.map(({ div, chart }) => window.Plotly.react(div, traces(chart), layout(chart), CONFIG)));
}

// All charts have the same x axis, so that a zoom into some steps is one of all.
function zoom(range) {
  state.range = range;
  draw();
}

function follow(div) {
  div.on("plotly_relayout", (change) => {
    const from = change["xaxis.range[0]"], to = change["xaxis.range[1]"];
    if (from !== undefined && to !== undefined) zoom([from, to]);
    else if (change["xaxis.autorange"]) zoom(null);
  });
  div.on("plotly_doubleclick", () => zoom(null));
}

function element(tag, parent, text) {
  const made = parent.appendChild(document.createElement(tag));
  if (text) made.textContent = text;
  return made;
}

function summary(chart) {
  const ends = chart.curves.map((curve) => {
    const known = curve.y.filter((value) => value !== null);
    return `${data.runs[curve.run]} ${curve.label} ${curve.rows}: ${known[0]} to ${known[known.length - 1]}`;
  });
  return `${chart.title}, ${chart.unit}, by ${data.x}. ${ends.slice(0, 8).join("; ")}`;
}

function build() {
  const place = document.getElementById("charts");
  for (const group of data.groups) {
    element("h3", place, group.title);
    const grid = element("div", place);
    grid.className = "charts";
    for (const chart of group.charts) {
      const figure = element("figure", grid);
      const caption = element("figcaption", figure, chart.title);
      if (chart.about) element("span", caption, chart.about).className = "note";
      const div = element("div", figure);
      div.setAttribute("role", "img");
      div.setAttribute("aria-label", summary(chart));
      charts.push({ div, chart });
    }
  }
}

function paintKeys() {
  document.querySelectorAll(".key").forEach((key, run) => {
    const palette = data.palettes[theme()];
    key.style.borderTopColor = key.style.color = palette[run % palette.length];
    key.textContent = hasSymbols() ? symbol(run)[1] : "";
  });
}

function buildControls() {
  const runs = document.getElementById("runs");
  runs.hidden = data.runs.length < 2;
  if (data.runs.length > 1) {
    data.runs.forEach((name, run) => {
      const label = element("label", runs);
      const box = element("input", label);
      box.type = "checkbox";
      box.checked = true;
      box.addEventListener("change", () => {
        if (box.checked) state.hidden.delete(run);
        else state.hidden.add(run);
        draw();
      });
      element("span", label).className = "key";
      element("span", label, name);
    });
    document.getElementById("curves-note").textContent +=
      " Solid lines are held-out rows where a chart has them, dotted ones training rows; of two quantities, " +
      "the second one (rejected) is dashed.";
  }
  const slider = document.getElementById("smoothing"), byNoise = document.getElementById("by-noise");
  const smooth = () => {
    state.smoothing = byNoise.checked ? null : Number(slider.value);
    draw();
  };
  slider.addEventListener("input", () => {
    byNoise.checked = false;
    smooth();
  });
  byNoise.addEventListener("change", smooth);
  document.getElementById("logarithmic").addEventListener("change", (event) => {
    state.logarithmic = event.target.checked;
    draw();
  });
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("controls").hidden = false;
}

function repaint() {
  paintKeys();
  return draw();
}

function followTheme() {
  document.getElementById("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
    repaint();
  });
  dark.addEventListener("change", repaint);
  for (const [name, printing] of [["beforeprint", true], ["afterprint", false]]) {
    window.addEventListener(name, () => {
      state.printing = printing;
      repaint();
    });
  }
}

async function unpackPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly-gzip").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

async function main() {
  if (typeof DecompressionStream === "undefined") {
    document.getElementById("curves-note").textContent =
      "This browser is too old for the curves; the folders of the runs have them as pictures too, curves.png " +
      "and training.png.";
    return;
  }
  await unpackPlotly();
  build();
  buildControls();
  followTheme();
  await repaint();
  charts.forEach(({ div }) => follow(div));
  document.documentElement.dataset.drawn = String(charts.length);
}

main();
