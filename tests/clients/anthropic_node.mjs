// Anthropic's SDK for Node.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.KVFLEET_NODE}/`);
const Anthropic = require("@anthropic-ai/sdk").default;
const manifest = `${process.env.KVFLEET_NODE}/node_modules/@anthropic-ai/sdk/package.json`;
const { version } = JSON.parse(readFileSync(manifest, "utf8"));
const TEXT = "This is a fake answer.";
const client = new Anthropic({ baseURL: process.env.KVFLEET_URL, apiKey: process.env.KVFLEET_KEY });
const input_schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const ask = { model: "llama", max_tokens: 100, messages: [{ role: "user", content: "Hi" }] };
const tools = [{ name: "weather", description: "The weather in a city.", input_schema }];

const message = await client.messages.create(ask);
assert.deepEqual([message.content[0].text, message.stop_reason], [TEXT, "end_turn"]);
const stream = client.messages.stream(ask);
let said = "";
stream.on("text", (text) => { said += text; });
const streamed = await stream.finalMessage();
assert.equal(said, TEXT);
assert.ok(streamed.usage.input_tokens > 0);
const called = await client.messages.stream({ ...ask, tools }).finalMessage();
assert.equal(called.stop_reason, "tool_use");
assert.deepEqual(called.content[0].input, { city: "Rome" });
const result = { type: "tool_result", tool_use_id: called.content[0].id, content: "Sunny." };
const turns = [...ask.messages, { role: "assistant", content: called.content }, { role: "user", content: [result] }];
assert.equal((await client.messages.create({ ...ask, messages: turns, tools })).content[0].text, TEXT);
await assert.rejects(client.messages.create({ ...ask, model: "nobody" }), (error) => {
  return error instanceof Anthropic.NotFoundError && error.error.error.type === "not_found_error";
});
await assert.rejects(client.messages.create({ ...ask, model: "busy" }), (error) => {
  return error instanceof Anthropic.RateLimitError && Number(error.headers.get("retry-after")) >= 1;
});
await assert.rejects(client.messages.stream({ ...ask, model: "breaks" }).finalMessage(), (error) => {
  return error instanceof Anthropic.APIError && error.message.includes("broke off");
});

console.log(`ok @anthropic-ai/sdk (node) ${version}`);
