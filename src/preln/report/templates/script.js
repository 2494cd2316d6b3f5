"use strict";
// Without this script the whole ledger is shown; with it, only what the reader asks for.
document.querySelectorAll("[data-ledger]").forEach(function (ledger) {
  var form = ledger.querySelector("form");
  var entries = Array.prototype.slice.call(ledger.querySelectorAll("[data-status]"));
  var count = ledger.querySelector("[data-count]");
  function apply() {
    var status = form.elements.status.value;
    var kind = form.elements.kind.value;
    var evidence = form.elements.evidence.value;
    var words = form.elements.words.value.trim().toLowerCase();
    var shown = 0;
    entries.forEach(function (entry) {
      var fits = (!status || entry.dataset.status === status)
        && (!kind || entry.dataset.kind === kind)
        && (!evidence || entry.dataset.evidence.split(" ").indexOf(evidence) !== -1)
        && (!words || entry.textContent.toLowerCase().indexOf(words) !== -1);
      entry.hidden = !fits;
      if (fits) { shown += 1; }
    });
    count.textContent = shown + " of " + entries.length + " shown";
  }
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", function (event) { event.preventDefault(); });
  apply();
});
// A link to a hidden claim shows it again.
window.addEventListener("hashchange", function () {
  var target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) { return; }
  if (target.hidden) { target.hidden = false; }
  for (var parent = target.parentElement; parent; parent = parent.parentElement) {
    if (parent.tagName === "DETAILS") { parent.open = true; }
  }
  target.scrollIntoView();
});
