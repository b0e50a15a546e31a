"use strict";
// Everything a server said becomes text of a node, never markup: this file has the only maker of elements.
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

function make(tag, facts, ...children) {
  const [name, ...classes] = tag.split(".");
  const inSvg = ["svg", "path", "line"].includes(name);
  const node = inSvg ? document.createElementNS(SVG, name) : document.createElement(name);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(facts || {})) {
    if (key === "click") node.addEventListener("click", value);
    else if (key === "style") Object.assign(node.style, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : String(child));
  }
  return node;
}

// Quantities, as `kvfleet trace` puts them.
const whole = (n) => Math.round(n).toLocaleString("en");
function duration(ms) {
  if (ms === null || ms === undefined) return "";
  if (ms >= 10000) return (ms / 1000).toFixed(1) + " s";
  if (ms >= 1000) return (ms / 1000).toFixed(2) + " s";
  if (ms >= 100) return ms.toFixed(0) + " ms";
  if (ms >= 1) return ms.toFixed(1) + " ms";
  return ms >= 0.005 ? ms.toFixed(2) + " ms" : ms === 0 ? "0 ms" : "<0.01 ms";
}
function dollars(usd) { // as kvfleet/money.py has it
  if (usd === null || usd === undefined) return "";
  if (usd < 0) return "-" + dollars(-usd);
  if (usd === 0 || usd >= 0.9995) return "$" + usd.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
  if (usd < 1e-9) return "<$0.000000001";
  return "$" + usd.toFixed(2 - Math.floor(Math.log10(usd))).replace(/0+$/, "").padEnd(4, "0");
}
function quantity(value, unit) {
  if (value === null || value === undefined) return "";
  if (unit === "s") return duration(value * 1000);
  if (unit === "usd") return dollars(value);
  if (unit === "tokens") return plural(Math.round(value), "token");
  return value.toFixed(3) + (unit && unit !== "utility" ? " " + unit : "");
}
const plural = (n, word) => `${whole(n)} ${word}${n === 1 ? "" : "s"}`;
const percent = (share) => (share === null || share === undefined ? "" : Math.round(share * 100) + " %");
function compact(n) {
  if (n >= 1e6) return (n / 1e6).toFixed(1) + " M";
  if (n >= 1e4) return (n / 1e3).toFixed(1) + " k";
  return n >= 100 || Number.isInteger(n) ? whole(n) : n.toFixed(1);
}
function span(seconds) {
  const [d, h, m] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60];
  if (d) return `${d} d ${h} h`;
  if (h) return `${h} h ${m} min`;
  return m ? `${m} min` : `${Math.floor(seconds)} s`;
}
const words = (key) => key.replace(/_/g, " ");
const clock = (iso) => new Date(iso).toLocaleTimeString("en-GB");

// A table whose cells carry their column's title, which a phone shows instead of the head.
// Columns: [title, cell, isNumber]; those for which `cell` says nothing in any row are left out.
function table(label, rows, columns, none) {
  if (!rows.length) return make("p.none", {}, none);
  const isEmpty = (cell) => cell === "" || cell === null || cell === undefined;
  const shown = columns.filter(([, cell]) => rows.some((row) => !isEmpty(cell(row))));
  const head = shown.map(([title, , isNumber]) => make(isNumber ? "th.num" : "th", { scope: "col" }, title));
  const body = rows.map((row) => make("tr", {}, shown.map(([title, cell, isNumber]) =>
    make(isNumber ? "td.num" : "td", { "data-label": title }, cell(row)))));
  return make("div.scroll", {},
    make("table", { "aria-label": label }, make("thead", {}, make("tr", {}, head)), make("tbody", {}, body)));
}
function pairs(data, kind) {
  return make(kind || "dl.pairs", {}, Object.entries(data).map(([key, value]) =>
    [make("dt", {}, key), make("dd", {}, value)]));
}
function put(node, ...children) {
  // Whoever is on a button of a list that is drawn anew stays on it.
  const focus = node.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
  node.replaceChildren(...children);
  if (focus) node.querySelector(`[data-focus="${CSS.escape(focus)}"]`)?.focus({ preventScroll: true });
}

// The key and the colours, as far as this browser keeps anything.
const kept = {
  get(store, name) { try { return window[store].getItem(name) || ""; } catch { return ""; } },
  set(store, name, value) { try { window[store].setItem(name, value); } catch { /* it will be asked for again */ } },
};
class Refused extends Error {}
async function ask(path, options) {
  const key = kept.get("sessionStorage", "kvfleet-key");
  const headers = key ? { authorization: "Bearer " + key } : {};
  const answer = await fetch(path, { headers, cache: "no-store", credentials: "omit", ...options });
  if (answer.status === 401) throw new Refused(key ? "That key is not one of this gateway's." : "");
  if (!answer.ok) {
    const said = await answer.json().catch(() => null);
    if (answer.status === 403) throw new Refused(said?.error?.message || "That key may not see the dashboard.");
    throw new Error(said?.error?.message || `the gateway answered ${answer.status}`);
  }
  return answer;
}
