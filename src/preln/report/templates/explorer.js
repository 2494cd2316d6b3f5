// The layer explorer: what is chosen, what is pointed at. Its numbers are the cells of its own table.
document.querySelectorAll("[data-explorer]").forEach(function (root) {
  function list(selector, within) { return Array.prototype.slice.call((within || root).querySelectorAll(selector)); }
  var form = root.querySelector("[data-controls]");
  var readout = root.querySelector("[data-readout]");
  var legend = root.querySelector("[data-legend]");
  var holder = root.querySelector("[data-panels]");
  var slider = form.elements.block;
  var blocks = +root.dataset.blocks;
  var runs = list("input[name=run]").map(function (box) { return box.parentNode.textContent.trim(); });
  var several = runs.length > 1;
  var rows = list("tr[data-measure]").map(function (row) {
    var cells = list("td[data-v]", row);
    return {
      measure: row.dataset.measure, site: row.dataset.site, run: +row.dataset.run,
      texts: cells.map(function (cell) { return cell.textContent; }),
      cells: cells.map(function (cell) { return cell.dataset.v ? cell.dataset.v.split(" ").map(Number) : null; })
    };
  });
  var plans = list("tr[data-plan]").map(function (row) {
    var removed = [];
    list("td[data-v]", row).forEach(function (cell, layer) { if (cell.textContent) { removed.push(layer); } });
    return { name: row.dataset.plan + (several ? " of " + runs[+row.dataset.run] : ""), removed: removed };
  });
  var sites = [];
  rows.forEach(function (row) { if (sites.indexOf(row.site) === -1) { sites.push(row.site); } });
  rows.forEach(function (row) {
    var site = sites.indexOf(row.site);
    row.colour = COLOURS[(several ? row.run : site) % COLOURS.length];
    row.dash = DASHES[(several ? site : 0) % DASHES.length];
    row.mark = SHAPES[(several ? row.run : site) % SHAPES.length];
  });
  var layers = rows[0].texts.map(function (_, layer) { return layer; });
  var panels = [], shown = [], removed = [];
  function checked(name) { return list("input[name=" + name + "]:checked").map(function (box) { return box.value; }); }
  function add(parent, tag, text, name) {
    var made = document.createElement(tag);
    made.textContent = text;
    if (name) { made.className = name; }
    parent.appendChild(made);
    return made;
  }
  function key(row, words) {
    var item = add(legend, "span", "", "key");
    var picture = shape("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" });
    picture.appendChild(shape("path", { d: "M0 5H30", stroke: row.colour, "stroke-width": 1.6, "stroke-dasharray": row.dash }));
    picture.appendChild(shape("path", { d: row.mark, fill: row.colour, transform: "translate(15 5)" }));
    item.appendChild(picture);
    item.appendChild(document.createTextNode(" " + words));
  }
  function about(row) {
    return row.measure + (row.site === "block" ? "" : ", " + row.site) + (several ? ", " + runs[row.run] : "");
  }
  function point(layer) {
    slider.value = layer;
    panels.forEach(function (panel) { panel.point(layer); });
    var gone = removed.indexOf(layer) !== -1;
    var title = (layer < blocks ? "Block " + layer : "After the last block (" + layer + ")") + (gone ? ", pruned" : "");
    readout.textContent = "";
    add(readout, "strong", title);
    var table = add(readout, "table", "");
    var spoken = title;
    shown.forEach(function (row) {
      var line = add(table, "tr", ""), cell = row.cells[layer];
      add(line, "th", about(row)).scope = "row";
      add(line, "td", row.texts[layer], "n");
      add(line, "td", cell && cell.length === 3 ? plainNumber(cell[1]) + " to " + plainNumber(cell[2]) : "", "n soft");
      if (cell) { spoken += "; " + about(row) + " " + row.texts[layer]; }
    });
    slider.setAttribute("aria-valuetext", spoken);
  }
  function draw() {
    var names = checked("measure"), chosen = several ? checked("run").map(Number) : [0];
    var plan = form.elements.plan && form.elements.plan.value !== "" ? plans[+form.elements.plan.value] : null;
    removed = plan ? plan.removed : [];
    shown = rows.filter(function (row) { return names.indexOf(row.measure) !== -1 && chosen.indexOf(row.run) !== -1; });
    holder.textContent = "";
    legend.textContent = "";
    var told = [];
    shown.forEach(function (row) {
      var words = [several ? runs[row.run] : "", sites.length > 1 ? row.site : ""].filter(Boolean).join(", ");
      if (words && told.indexOf(words) === -1) { told.push(words); key(row, words); }
    });
    if (plan) { add(legend, "span", "\u00d7 pruned by " + plan.name, "key"); }
    var width = Math.max(300, Math.min(960, holder.clientWidth || 960));
    panels = names.map(function (name, place) {
      var own = shown.filter(function (row) { return row.measure === name; });
      var panel = drawPanel(name, own, { width: width, layers: layers, removed: removed, last: place === names.length - 1 });
      function follow(event) {
        var layer = panel.layerAt(event.clientX);
        if (layer !== null) { point(layer); }
      }
      panel.svg.addEventListener("pointermove", follow);
      panel.svg.addEventListener("pointerdown", follow);
      panel.svg.addEventListener("keydown", function (event) {
        var to = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (to) { event.preventDefault(); point(Math.max(0, Math.min(layers.length - 1, +slider.value + to))); }
      });
      holder.appendChild(panel.svg);
      return panel;
    });
    if (!names.length) { add(holder, "p", "No measure is chosen.", "soft"); }
    point(+slider.value);
  }
  [form, readout, legend, holder].forEach(function (part) { part.hidden = false; });
  root.querySelector("[data-fallback]").open = false;
  form.addEventListener("input", function (event) { if (event.target === slider) { point(+slider.value); } else { draw(); } });
  form.addEventListener("submit", function (event) { event.preventDefault(); });
  var waiting = null;
  window.addEventListener("resize", function () { clearTimeout(waiting); waiting = setTimeout(draw, 100); });
  draw();
});
