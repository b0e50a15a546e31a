// The page: what is shown, and where it comes from.
const COUNTERS = [
  ["total_requests", "Requests", whole], ["total_errors", "Errors", whole], ["error_rate", "Error rate", String],
  ["avg_latency_ms", "Mean latency", duration], ["total_refused", "Refused", whole],
  ["total_cancelled", "Left by client", whole], ["total_fallbacks", "Fallbacks", whole],
  ["total_cache_hits", "Answers from cache", whole], ["total_affinity_hits", "Prefix cache hits", whole],
  ["total_policy_blocks", "Policy blocks", whole], ["total_cost_usd", "Cost", dollars],
];
let latest = null, isPaused = false, isWhole = false;
const isPhone = matchMedia("(max-width: 720px)");

function about(fleet) {
  const facts = [fleet.strategy, plural(fleet.models, "model"), fleet.replicas === undefined ? null : plural(fleet.replicas, "replica"),
    "up " + span(fleet.uptime_seconds), fleet.version && "kvfleet " + fleet.version, fleet.pipeline && "pipeline " + fleet.pipeline];
  byId("fleet").textContent = fleet.name || "kvfleet";
  document.title = (fleet.name ? fleet.name + " · " : "") + "kvfleet";
  byId("about").textContent = facts.filter(Boolean).join(" · ");
}
function health(replica) {
  if (replica.enabled === false) return make("span.soft", {}, "switched off");
  if (replica.healthy && replica.rate_limited_for_s) return make("span.warn", {}, "rate limited for " + duration(replica.rate_limited_for_s * 1000));
  return replica.healthy ? make("span.good", {}, "healthy") : make("span.bad", {}, "down" + (replica.reason ? ": " + replica.reason : ""));
}
const breaker = (state) => (state ? make(state === "closed" ? "span" : "span.warn", {}, words(state)) : "");
const bar = (share, look) => make("span.bar", { "aria-hidden": "true" },
  make(look ? "i." + look : "i", { style: { width: Math.min(100, share * 100) + "%" } }));
const gauge = (share) => (share === null || share === undefined ? "" : [bar(share), percent(share)]);
function replicas(list) {
  return table("Replicas", list, [
    ["Replica", (r) => r.name], ["Provider", (r) => r.provider], ["Health", health], ["Breaker", (r) => breaker(r.breaker)], ["Share", (r) => (r.panic ? "panic" : r.share === null || r.share === undefined || r.share === 1 ? "" : Math.round(r.share * 100) + " %")],
    ["Check", (r) => duration(r.latency_ms), true],
    ["Ours in flight", (r) => r.in_flight, true], ["Running", (r) => r.running, true], ["Waiting", (r) => r.waiting, true],
    ["KV cache in use", (r) => gauge(r.kv_usage)], ["Rate limit left", (r) => gauge(r.rate_limit_left)], ["Prefix hits", (r) => percent(r.prefix_hit_rate), true],
    ["Cache known", (r) => (r.cache_why ? `${r.cache_mode}: ${r.cache_why}` : r.cache_mode)], ["Expected first byte", (r) => duration(r.expected_ttfb_s ? r.expected_ttfb_s * 1000 : null), true],
  ], "No replicas are known.");
}
function models(stats) {
  return table("Models", Object.entries(stats), [
    ["Model", ([name]) => name], ["Chosen", ([, m]) => whole(m.requests), true],
    ["Calls", ([, m]) => (m.attempts === undefined ? "" : whole(m.attempts)), true],
    ["Failed", ([, m]) => whole(m.errors ?? 0), true], ["Mean latency", ([, m]) => duration(m.avg_latency_ms), true],
    ["Mean first byte", ([, m]) => duration(m.avg_ttfb_ms), true],
    ["Prompt tokens", ([, m]) => (m.prompt_tokens ? compact(m.prompt_tokens) : ""), true],
    ["of them cached", ([, m]) => (m.cached_tokens ? compact(m.cached_tokens) : ""), true],
    ["Answer tokens", ([, m]) => (m.completion_tokens ? compact(m.completion_tokens) : ""), true],
    ["Cost", ([, m]) => (m.cost_usd ? dollars(m.cost_usd) : ""), true],
  ], "No model was chosen yet.");
}
function outcome(route) {
  const look = { answered: "good", cached: "good", failed: "bad", no_candidates: "bad", refused: "warn", cancelled: "warn" }[route.outcome] || "soft";
  return make("span." + look, {}, words(route.outcome) + (route.error ? ": " + words(String(route.error)) : ""));
}
function routes(list) {
  const time = (r) => (r.id ? make("button.open", { type: "button", "data-focus": r.id, click: () => openTrace(r.id),
    "aria-label": `Open the decision of ${clock(r.timestamp)}, ${r.selected_model || r.outcome}` }, clock(r.timestamp)) : clock(r.timestamp));
  const scores = (r) => (r.id ? "" : Object.entries(r.scores || {}).map(([who, score]) => `${who} ${score.toFixed(2)}`).join(", "));
  const few = isWhole ? list : list.slice(0, isPhone.matches ? 6 : 15);
  const more = list.length > few.length ? make("button.more", { type: "button", "data-focus": "all", click: () => {
    isWhole = true;
    put(byId("routes"), ...routes(list));
  } }, `Show all ${whole(list.length)}`) : "";
  return [table("Last decisions", few, [
    ["Time", time], ["Prompt", (r) => r.prompt], ["Operation", (r) => r.operation], ["Model", (r) => r.selected_model || "–"],
    ["Answered by", (r) => r.served_by], ["Strategy", (r) => r.strategy], ["Scores", scores], ["Outcome", outcome],
    ["Attempts", (r) => r.attempts, true], ["Tokens", (r) => (r.tokens ? whole(r.tokens) : ""), true],
    ["Notes", (r) => [r.fallback && "fallback", r.cache_hit && (r.id && r.outcome !== "cached" ? "prefix hit" : "cache hit")].filter(Boolean).join(", ")],
    ["First byte", (r) => duration(r.ttfb_ms), true], ["Latency", (r) => duration(r.latency_ms), true],
  ], "No request has come yet."), more];
}

// What stages and programs tell of themselves has no fixed shape: numbers and words in cards, lists of things as tables.
const MOST_LINES = 50;
const titled = (key) => words(key.replace(/_(?:usd|s|ms)$/, "").replace(/_pct$/, " %")).replace(/^[a-z](?=[a-z ]*( %)?$)/, (letter) => letter.toUpperCase());
const isThing = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
function plain(value, key) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) return value.map((one) => plain(one)).join(", ") || "–";
  if (isThing(value)) return Object.entries(value).map(([name, one]) => `${words(name)} ${plain(one, name)}`).join(", ") || "–";
  if (typeof value !== "number") return String(value);
  if (/usd/.test(key)) return dollars(value);
  if (/_pct$/.test(key)) return Number(value.toPrecision(3)) + " %";
  if (/_ms$/.test(key)) return duration(value);
  if (/(^|_)(share|rate)$/.test(key) && value <= 1) return Number((value * 100).toPrecision(3)) + " %";
  if (/_s$/.test(key)) return value < 120 ? duration(value * 1000) : span(value);
  return Number.isInteger(value) ? whole(value) : Number(value.toPrecision(4));
}
function things(title, list, beyond = 0) {
  // What is nothing for everybody is left out where there is much to tell.
  const all = [...new Set(list.flatMap((one) => Object.keys(one)))];
  const keys = all.length > 8 ? all.filter((key) => list.some((one) => one[key])) : all;
  const isNumber = (key) => list.some((one) => typeof one[key] === "number");
  const rest = beyond + Math.max(list.length - MOST_LINES, 0);
  const more = rest > 0 && make("p.soft", {}, `… and ${whole(rest)} more`);
  return [table(title, list.slice(0, MOST_LINES),
    keys.map((key) => [titled(key), (one) => (one[key] === null ? "" : key === "spent_pct" ? spent(one) : plain(one[key], key)), key !== "spent_pct" && isNumber(key)]), "none"), more];
}
const spent = (one) => [bar(one.spent_pct / 100, one.alert && "warn"), Number(one.spent_pct.toPrecision(3)) + " %"];
// Things of one kind under their names, as the arms of a strategy are: the rows of a table.
function alike(nested) {
  const shape = (thing) => Object.keys(thing).join();
  return nested.length > 1 && nested.every(([, thing]) => shape(thing) === shape(nested[0][1]) && !Object.values(thing).some(isThing));
}
function card(title, state) {
  const own = Object.entries(state).filter(([key, value]) => !/_more$/.test(key) && !isThing(value) && !(Array.isArray(value) && value.some(isThing)));
  const nested = Object.entries(state).filter(([, value]) => isThing(value));
  const lists = Object.entries(state).filter(([, value]) => Array.isArray(value) && value.some(isThing));
  let columns = lists.length ? 9 : 0;
  const rows = (entries) => {
    columns = Math.max(columns, Object.keys(entries[0][1]).length);
    return things(title, entries.map(([name, thing]) => ({ name: words(name), ...thing })));
  };
  const inner = alike(nested) ? rows(nested) : nested.map(([key, value]) => {
    const entries = Object.entries(value);
    return entries.every(([, one]) => isThing(one)) && alike(entries) ? rows(entries) : card(titled(key), value);
  });
  return make("div.card" + (columns > 6 ? ".wide" : columns ? ".half" : ""), {}, make("h3", {}, title),
    own.length ? pairs(Object.fromEntries(own.map(([key, value]) => [titled(key), plain(value, key)]))) : [],
    inner, lists.map(([key, value]) => things(titled(key), value.filter(isThing), state[key + "_more"])));
}
function limits(entries) {
  const left = (kind) => ([, limit]) => {
    const [rest, most] = [limit[kind + "_left"], limit[kind + "_limit"]];
    return rest === undefined ? "" : whole(rest) + (most === undefined ? "" : " of " + whole(most));
  };
  return table("Rate limits", entries, [
    ["Replica", ([name]) => name], ["Left", ([, limit]) => gauge(limit.capacity)],
    ["Requests left", left("requests"), true], ["Tokens left", left("tokens"), true],
    ["Requests, last minute", ([, limit]) => whole(limit.requests_last_minute ?? 0), true],
    ["Tokens, last minute", ([, limit]) => compact(limit.tokens_last_minute ?? 0), true],
    ["Asked to wait", ([, limit]) => whole(limit.refused ?? 0), true],
    ["State", ([, limit]) => (limit.throttled ? make(limit.closed ? "span.bad" : "span.warn", {}, limit.reason) : make("span.good", {}, "free"))],
  ], "No limit is known.");
}
const GROUPS = [[/rate_?limit/, "Rate limits"], [/budget|quota/, "Budgets"], [/experiment|canary|rollout|weighted$|epsilon_greedy|ucb1|thompson|exp3/, "Experiments"], [/slo/, "Objectives"], [/shadow|mirror/, "Shadow traffic"], [/./, "Stages"]];
function sections(state) {
  const things = { ...(state.stages || {}) };
  const groups = new Map();
  const add = (title, name, thing) => groups.set(title, [...(groups.get(title) || []), card(name, thing)]);
  const told = Object.entries(state.rate_limits || {});
  const isOurs = told.length > 0 && told.every(([, limit]) => isThing(limit) && typeof limit.capacity === "number");
  if (isOurs) groups.set("Rate limits", [make("div.wide", {}, limits(told))]);
  for (const [title, key] of [...(isOurs ? [] : [["Rate limits", "rate_limits"]]), ["Budgets", "budgets"]]) {
    for (const [name, thing] of Object.entries(state[key] || {})) add(title, name, isThing(thing) ? thing : { value: thing });
  }
  for (const [name, thing] of Object.entries(things)) {
    if (Object.keys(thing).length) add(GROUPS.find(([pattern]) => pattern.test(name))[1], name, thing);
  }
  const order = GROUPS.map(([, title]) => title).filter((title) => groups.has(title));
  return order.map((title) => make("section", { "aria-label": title }, make("h2", {}, title), make("div.cards", {}, groups.get(title))));
}

function draw(state) {
  latest = state;
  byId("door").hidden = true;
  byId("board").hidden = false;
  about(state.fleet);
  const counters = state.counters;
  put(byId("counters"), ...(counters === null ? [make("p.none", {}, "Metrics are switched off: telemetry.prometheus_enabled")] :
    COUNTERS.filter(([key]) => counters[key] !== undefined).map(([key, title, form]) =>
      make("div", {}, make("dt", {}, title), make("dd", {}, form(counters[key]))))));
  byId("live").hidden = !state.series;
  if (state.series) { remember(state.series, performance.now()); drawCharts(); }
  const told = state.replicas || Object.entries(state.health).map(([name, facts]) => ({ name, ...facts }));
  put(byId("replicas"), replicas(told));
  byId("by-model").hidden = !Object.keys(state.model_stats).length;
  put(byId("models"), models(state.model_stats));
  if (!isPaused) put(byId("routes"), ...routes(state.recent_routes));
  put(byId("stages"), ...sections(state));
}
function say(text, look) {
  const link = byId("link");
  if (link.textContent !== text) link.textContent = text; // said aloud only when it changes
  link.className = "pill " + look;
}

async function follow(path) {
  // A connection that broke without a word is noticed by its silence.
  const stop = new AbortController();
  addEventListener("pagehide", () => stop.abort(), { once: true });
  let watch = setTimeout(() => stop.abort(), 10000);
  const answer = await ask(path, { signal: stop.signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  say("live", "good");
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    clearTimeout(watch);
    if (done) return;
    watch = setTimeout(() => stop.abort(), 10000);
    const events = (text + value).split("\n\n");
    text = events.pop();
    if (events.length) draw(JSON.parse(events.at(-1).slice(6)));
  }
}
async function poll(path) {
  draw(await (await ask(path)).json());
  say("every 3 s", "good");
}
let isAsking = false, timer = 0;
async function run() {
  clearTimeout(timer);
  if (isAsking || document.hidden) return;
  isAsking = true;
  const { events, api } = document.body.dataset;
  let wait = 3000;
  try {
    await (events ? follow(events) : poll(api + "/state"));
    if (events) { say("reconnecting", "warn"); wait = 1000; }
  } catch (error) {
    if (error instanceof Refused) { knock(error.message); wait = 0; }
    else say("no connection", "bad");
  }
  isAsking = false;
  if (wait) timer = setTimeout(run, wait);
}
function knock(message) {
  kept.set("sessionStorage", "kvfleet-key", "");
  byId("board").hidden = true;
  byId("door").hidden = false;
  byId("refusal").textContent = message;
  say("locked", "warn");
  byId("key").focus();
}

byId("door").addEventListener("submit", (event) => {
  event.preventDefault();
  kept.set("sessionStorage", "kvfleet-key", byId("key").value.trim());
  byId("key").value = "";
  run();
});
byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", String(isPaused));
  byId("pause").textContent = isPaused ? "Go on" : "Pause";
  if (latest) draw(latest);
});
byId("shut").addEventListener("click", () => byId("trace").close());
byId("trace").addEventListener("close", () => { // the list was drawn anew meanwhile, and whoever opened a decision goes on there
  document.querySelector(`#routes [data-focus="${CSS.escape(byId("trace").dataset.id || "")}"]`)?.focus({ preventScroll: true });
});
isPhone.addEventListener("change", () => { if (latest) draw(latest); });
function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
function paint(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
}
byId("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  kept.set("localStorage", "kvfleet-theme", theme);
  paint(theme);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint());
paint(kept.get("localStorage", "kvfleet-theme"));
document.addEventListener("visibilitychange", run);
addEventListener("pageshow", run);
