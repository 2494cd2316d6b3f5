// One drawn panel of the layer explorer: a line a series, a band where there are intervals.
var SVG = "http://www.w3.org/2000/svg";
var COLOURS = [["blue", "#0072b2"], ["vermillion", "#d55e00"], ["green", "#009e73"], ["purple", "#cc79a7"],
  ["orange", "#e69f00"], ["sky", "#56b4e9"]].map(function (c) { return "var(--fig-" + c[0] + ", " + c[1] + ")"; });
var DASHES = ["", "6 2", "1.5 2", "7 2 1.5 2", "9 3", "4 1 1.5 1"];
var SHAPES = [
  "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z", "M-2.7-2.7h5.4v5.4h-5.4z", "M0-3.4L3.3 2.6H-3.3z",
  "M0-3.6L3.2 0L0 3.6L-3.2 0z", "M0 3.4L3.3-2.6H-3.3z", "M-1-3.2h2v2.2h2.2v2h-2.2v2.2h-2v-2.2h-2.2v-2h2.2z"
];
function shape(name, attributes, text) {
  var made = document.createElementNS(SVG, name);
  Object.keys(attributes).forEach(function (key) { made.setAttribute(key, attributes[key]); });
  if (text !== undefined) { made.textContent = text; }
  return made;
}
function plainNumber(value) {
  if (value === 0) { return "0"; }
  var size = Math.abs(value);
  var text = size >= 1e-4 && size < 1e6 ? String(+value.toPrecision(3)) : value.toExponential(1).replace("e+", "e");
  return text.replace(/-/g, "\u2212");
}
// Logarithmic where everything is positive and spans a factor above 3, as in the figures below.
function scaleOf(values) {
  var least = Math.min.apply(null, values), most = Math.max.apply(null, values);
  var log = least > 0 && most / least > 3, ticks = [], step, at;
  if (log) {
    var decades = Math.log10(most / least);
    var heads = decades < 1 ? [1, 2, 3, 5, 7] : decades < 2.2 ? [1, 2, 5] : [1];
    for (at = Math.floor(Math.log10(least)); at <= Math.log10(most); at += 1) {
      heads.forEach(function (head) {
        var tick = head * Math.pow(10, at);
        if (tick >= least && tick <= most) { ticks.push(tick); }
      });
    }
    while (ticks.length > 6) { ticks = ticks.filter(function (_, i) { return i % 2 === 0; }); }
    if (!ticks.length) { ticks = [least, most]; }
  } else {
    if (most === least) { var room = Math.abs(most) * 0.1 || 1; most += room; least -= room; }
    step = Math.pow(10, Math.floor(Math.log10((most - least) / 4)));
    [2, 2.5, 2].forEach(function (factor) { if ((most - least) / step > 5) { step *= factor; } });
    for (at = Math.ceil(least / step); at * step <= most + step * 1e-9; at += 1) { ticks.push(+(at * step).toPrecision(12)); }
  }
  function place(value) { return log ? Math.log10(value / least) / Math.log10(most / least) : (value - least) / (most - least); }
  return { place: place, ticks: ticks, log: log, least: least, most: most };
}
function drawPanel(measure, series, view) {
  var left = 56, right = 10, top = 26, bottom = view.last ? 40 : 22, height = 148 + top + bottom;
  var count = view.layers.length, step = (view.width - left - right) / count;
  function across(layer) { return left + (layer + 0.5) * step; }
  var values = [];
  series.forEach(function (own) {
    own.cells.forEach(function (cell) { if (cell) { values = values.concat(cell); } });
  });
  var svg = shape("svg", { viewBox: "0 0 " + view.width + " " + height, "data-panel": measure, role: "img", tabindex: 0 });
  view.removed.forEach(function (layer) {
    svg.appendChild(shape("rect", { x: across(layer) - step / 2, y: top, width: step, height: 148, "class": "cut" }));
    svg.appendChild(shape("text", { x: across(layer), y: top + 9, "text-anchor": "middle", "class": "cross" }, "\u00d7"));
  });
  svg.appendChild(shape("text", { x: left, y: 14, "class": "name" }, measure));
  if (!values.length) {
    svg.appendChild(shape("text", { x: left, y: top + 70 }, "no values"));
    svg.setAttribute("aria-label", measure + ": no values");
    return { svg: svg, point: function () {}, layerAt: function () { return null; } };
  }
  var scale = scaleOf(values);
  function up(value) { return top + 140 - 132 * scale.place(value); }
  scale.ticks.forEach(function (tick) {
    svg.appendChild(shape("line", { x1: left, x2: view.width - right, y1: up(tick), y2: up(tick), "class": "grid" }));
    svg.appendChild(shape("text", { x: left - 6, y: up(tick) + 4, "text-anchor": "end" }, plainNumber(tick)));
  });
  svg.appendChild(shape("line", { x1: left, x2: view.width - right, y1: top + 148, y2: top + 148, "class": "axis" }));
  var every = [1, 2, 5, 10, 20, 50].filter(function (n) { return n * step >= 26; })[0] || 100;
  for (var l = 0; l < count; l += every) {
    svg.appendChild(shape("text", { x: across(l), y: top + 162, "text-anchor": "middle" }, String(l)));
  }
  if (view.last) {
    svg.appendChild(shape("text", { x: (left + view.width - right) / 2, y: height - 4, "text-anchor": "middle" }, "block"));
  }
  var cursor = shape("rect", { y: top, width: step, height: 148, "class": "cursor" });
  svg.appendChild(cursor);
  series.forEach(function (own) {
    var line = "", high = [], low = [], open = false;
    own.cells.forEach(function (cell, layer) {
      if (!cell) { open = false; return; }
      line += (open ? "L" : "M") + across(layer).toFixed(1) + " " + up(cell[0]).toFixed(1);
      open = true;
      if (cell.length === 3 && own.cells.length > 1) {
        high.push(across(layer).toFixed(1) + " " + up(cell[2]).toFixed(1));
        low.unshift(across(layer).toFixed(1) + " " + up(cell[1]).toFixed(1));
      }
    });
    if (high.length > 1) {
      svg.appendChild(shape("path", { d: "M" + high.concat(low).join("L") + "z", fill: own.colour, "fill-opacity": 0.2 }));
    }
    svg.appendChild(shape("path", { d: line, fill: "none", stroke: own.colour, "stroke-width": 1.6, "stroke-dasharray": own.dash }));
    own.cells.forEach(function (cell, layer) {
      if (cell) {
        svg.appendChild(shape("path", { d: own.mark, fill: own.colour, transform: "translate(" + across(layer).toFixed(1) + " " + up(cell[0]).toFixed(1) + ")" }));
      }
    });
  });
  svg.setAttribute("aria-label", measure + " by block, " + series.length + (series.length === 1 ? " line" : " lines") +
    ", from " + plainNumber(scale.least) + " to " + plainNumber(scale.most) + "; the arrow keys go from block to block");
  return {
    svg: svg,
    point: function (layer) { cursor.setAttribute("x", across(layer) - step / 2); },
    layerAt: function (clientX) {
      var box = svg.getBoundingClientRect();
      var layer = Math.floor(((clientX - box.left) * view.width / box.width - left) / step);
      return layer >= 0 && layer < count ? layer : null;
    }
  };
}
