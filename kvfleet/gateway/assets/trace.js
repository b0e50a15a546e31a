// One decision: what happened when, who was a candidate, and why the others were not the one.
function waterfall(title, steps, total) {
  const place = (ms) => Math.min(100, (ms / Math.max(total, 1e-6)) * 100);
  return [make("h3", {}, `${title}: ${duration(total)}`), make("div.fall", { role: "list" }, steps.map((step) => {
    const [left, right] = [place(step.start), place(step.start + step.took)];
    const bars = step.wait === undefined ? [] : [make(`i.wait.${step.look}`,
      { style: { left: left + "%", width: place(step.start + step.wait) - left + "%" } })];
    const from = step.wait === undefined ? left : place(step.start + step.wait);
    bars.push(make(`i.${step.look}`, { style: { left: from + "%", width: Math.max(0, right - from) + "%" } }));
    return make("div.step", { role: "listitem" },
      make("span.mono", {}, step.name), make("span.track", { "aria-hidden": "true" }, bars),
      make("span.num", {}, duration(step.took)),
      step.notes.map((note) => make(note.look ? `span.note.${note.look}` : "span.note", {}, note.text)));
  }))];
}
function notesOf(stage) {
  const notes = [], add = (text, look) => notes.push({ text, look });
  const facts = Object.entries(stage.facts || {});
  if (facts.length) add(facts.map(([name, value]) => `${words(name)}: ${(Array.isArray(value) ? value.join(", ") : value) || "none"}`).join(" · "));
  if (stage.candidates_in !== undefined && stage.candidates_out !== undefined && stage.candidates_in !== stage.candidates_out) {
    add(`${stage.candidates_in} → ${plural(stage.candidates_out, "candidate")}`);
  }
  for (const drop of stage.drops || []) add(`drops ${drop.candidate}: ${drop.reason}${drop.rule ? ` [${drop.rule}]` : ""}`, "warn");
  if (stage.scores) {
    const modes = stage.modes || {};
    add(Object.entries(stage.scores).slice(0, 12).map(([who, value]) =>
      `${who} ${quantity(value, stage.unit)}${modes[who] ? ` (${modes[who]})` : ""}`).join(" · "));
  }
  for (const [who, why] of Object.entries(stage.reasons || {}).slice(0, 12)) add(`${who} ${why}`, "warn");
  const instead = Object.entries(stage.instead || {});
  if (instead.length) add(`instead: ${instead.map(([choice, value]) => `${words(choice.replace(/_s$/, ""))} ${quantity(value, stage.unit)}`).join(" · ")}`);
  if (stage.mode) add(`mode: ${stage.mode}`);
  if (stage.answered) add("had the answer", "good");
  if (stage.refusal) add(`refused: ${stage.refusal}${stage.retry_after_s ? `, try again in ${duration(stage.retry_after_s * 1000)}` : ""}`, "bad");
  if (stage.error) add(`${stage.error}${stage.skipped ? "; went on without it" : ""}`, "bad");
  return notes;
}
function timeline(trace) {
  const deciding = trace.stages.filter((stage) => stage.kind !== "execute" && stage.kind !== "observe");
  const until = deciding.reduce((end, stage) => Math.max(end, stage.start_ms + stage.duration_ms), 0);
  const steps = deciding.map((stage) => ({ name: stage.stage, start: stage.start_ms, took: stage.duration_ms,
    look: stage.error || stage.refusal ? "bad" : "stage", notes: notesOf(stage) }));
  const calls = trace.attempts.map((attempt) => ({
    name: `${attempt.number}. ${attempt.replica}`, start: attempt.start_ms, took: attempt.duration_ms,
    wait: attempt.ttfb_s === null ? undefined : attempt.ttfb_s * 1000, look: attempt.fault ? "bad" : "attempt",
    notes: attempt.fault ? [{ text: `${attempt.fault}: ${attempt.message}`, look: "bad" }] : [] }));
  const decision = { name: "decision", start: 0, took: until, look: "stage", notes: [] };
  return [...waterfall("The decision", steps, until),
    ...(calls.length ? waterfall("The whole route", [decision, ...calls], trace.total_latency_ms) : [])];
}
function candidates(trace) {
  const columns = [...new Set(trace.candidates.flatMap((one) => Object.keys(one.columns)))];
  return table("Candidates", trace.candidates, [
    ["Candidate", (c) => c.id],
    ["Place", (c) => c.rank ?? "", true],
    ["Score", (c) => quantity(c.total_score, c.unit), true],
    ...columns.map((name) => [words(name), (c) => (c.columns[name] ? quantity(c.columns[name].value, c.columns[name].unit) : ""), true]),
    ["Cached", (c) => (c.cached_tokens ? quantity(c.cached_tokens, "tokens") : ""), true],
    ["What became of it", (c) => (c.served ? make("span.good", {}, "answered") : c.rejected_reason || (c.selected ? "first choice" : ""))],
  ], "Nobody was a candidate.");
}
function attempts(trace) {
  return table("Attempts", trace.attempts, [
    ["Replica", (a) => a.replica], ["Attempt", (a) => a.number, true], ["Why", (a) => a.reason],
    ["First byte", (a) => duration(a.ttfb_s === null ? null : a.ttfb_s * 1000), true],
    ["Took", (a) => duration(a.duration_ms), true],
    ["Prompt tokens", (a) => (a.usage ? whole(a.usage.prompt_tokens) : ""), true],
    ["of them cached", (a) => (a.usage?.prompt_tokens_details ? whole(a.usage.prompt_tokens_details.cached_tokens) : ""), true],
    ["Answer tokens", (a) => (a.usage ? whole(a.usage.completion_tokens) : ""), true],
    ["Outcome", (a) => (a.fault ? make("span.bad", {}, `${a.fault}: ${a.message}`) : "ok")],
  ], "No backend was called.");
}
function drops(trace) {
  return table("Dropped", trace.drops, [["Candidate", (d) => d.candidate], ["Stage", (d) => d.stage],
    ["Rule", (d) => d.rule], ["Reason", (d) => d.reason]], "Nobody was dropped.");
}
function drawTrace(trace) {
  const facts = { Outcome: trace.outcome + (trace.error ? `: ${trace.error.message || trace.error.code}` : ""),
    "Asked for": trace.model_requested, "First choice": trace.selected_model, "Answered by": trace.served_by,
    Strategy: trace.strategy + (trace.strategy_overridden ? " (the request asked for it)" : ""),
    Tenant: trace.tenant, "Data class": trace.data_class, Arrived: trace.timestamp, Request: trace.request_id,
    Trace: trace.trace_id, Took: duration(trace.total_latency_ms), Cost: dollars(trace.cost_usd) };
  const told = Object.fromEntries(Object.entries(facts).filter(([, value]) => value));
  const parts = [pairs(told, "dl.pairs.left"), ...timeline(trace), make("h3", {}, "Candidates"), candidates(trace)];
  if (trace.drops.length) parts.push(make("h3", {}, "Dropped"), drops(trace));
  parts.push(make("h3", {}, "Attempts"), attempts(trace));
  for (const [name, text] of Object.entries(trace.content || {})) {
    parts.push(make("details", {}, make("summary", {}, `Captured ${name}`), make("pre", {}, text)));
  }
  put(byId("trace-body"), ...parts);
}
async function openTrace(id) {
  const dialog = byId("trace");
  dialog.dataset.id = id;
  put(byId("trace-body"), make("p.none", {}, "…"));
  if (!dialog.open) dialog.showModal();
  try {
    drawTrace(await (await ask(`${document.body.dataset.api}/route/${encodeURIComponent(id)}`)).json());
  } catch (error) {
    if (error instanceof Refused) dialog.close();
    put(byId("trace-body"), make("p.none", {}, error.message));
  }
  dialog.scrollTop = 0;
}
