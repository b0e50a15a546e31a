// OpenAI's SDK for Node: chat and responses.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.KVFLEET_NODE}/`);
const OpenAI = require("openai").default;
const manifest = `${process.env.KVFLEET_NODE}/node_modules/openai/package.json`;
const { version } = JSON.parse(readFileSync(manifest, "utf8"));
const TEXT = "This is a fake answer.";
const client = new OpenAI({ baseURL: `${process.env.KVFLEET_URL}/v1`, apiKey: process.env.KVFLEET_KEY });
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const fn = { name: "weather", description: "The weather in a city.", parameters };
const ask = { model: "llama", messages: [{ role: "user", content: "Hi" }] };

const whole = await client.chat.completions.create(ask);
assert.equal(whole.choices[0].message.content, TEXT);
let said = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
  said += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(said, TEXT);
const tools = [{ type: "function", function: fn }];
const call = (await client.chat.completions.create({ ...ask, tools })).choices[0].message.tool_calls[0];
assert.deepEqual(JSON.parse(call.function.arguments), { city: "Rome" });
await assert.rejects(client.chat.completions.create({ ...ask, model: "nobody" }), (error) => {
  return error instanceof OpenAI.NotFoundError && error.code === "model_not_found";
});
await assert.rejects(client.chat.completions.create({ ...ask, model: "busy" }), (error) => {
  return error instanceof OpenAI.RateLimitError && Number(error.headers.get("retry-after")) >= 1;
});
await assert.rejects(async () => {
  for await (const chunk of await client.chat.completions.create({ ...ask, model: "breaks", stream: true })) assert.ok(chunk);
}, (error) => error instanceof OpenAI.APIError && error.code === "stream_interrupted");

const answer = await client.responses.create({ model: "llama", input: "Hi" });
assert.equal(answer.output_text, TEXT);
const kinds = [];
for await (const event of await client.responses.create({ model: "llama", input: "Hi", stream: true })) {
  kinds.push(event.type);
}
assert.equal(kinds.at(-1), "response.completed");
const stream = client.responses.stream({ model: "llama", input: "Hi", tools: [{ type: "function", strict: false, ...fn }] });
const called = (await stream.finalResponse()).output[0];
assert.deepEqual([called.type, JSON.parse(called.arguments)], ["function_call", { city: "Rome" }]);
await assert.rejects(client.responses.create({ model: "llama", input: "Hi", store: true }), OpenAI.BadRequestError);
await assert.rejects(client.responses.create({ model: "busy", input: "Hi" }), OpenAI.RateLimitError);
await assert.rejects(client.responses.stream({ model: "breaks", input: "Hi" }).finalResponse(), (error) => {
  return error instanceof OpenAI.APIError && error.message.includes("broke off");
});

console.log(`ok openai (node) ${version}`);
