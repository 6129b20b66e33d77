// openai for node: chats, completions, responses and models.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { DATA_URL, EMPTY_OBJECT, KEY, MODEL, QUESTION, Shape, TOO_LONG, TOOL, URL_V1, Weather } from "./checks.mjs";
import { check, collect, redStar } from "./checks.mjs";

const client = new OpenAI({ baseURL: URL_V1, apiKey: KEY, maxRetries: 0, timeout: 60_000 });
const picture = [
  {
    role: "user",
    content: [
      { type: "image_url", image_url: { url: DATA_URL } },
      { type: "text", text: QUESTION },
    ],
  },
];
const items = [
  {
    role: "user",
    content: [
      { type: "input_image", image_url: DATA_URL, detail: "auto" },
      { type: "input_text", text: QUESTION },
    ],
  },
];
const weather = [{ role: "user", content: "How is the weather?" }];
const fields = { model: MODEL, messages: picture, max_tokens: 200, temperature: 0 };
const oneCall = { tool_choice: "required", parallel_tool_calls: false };
const ask = (more) => client.chat.completions.create({ ...fields, ...more });

await check("models", async () => {
  assert.equal((await collect(client.models.list()))[0].id, MODEL);
  assert.equal((await client.models.retrieve(MODEL)).id, MODEL);
});

await check("chat", async () => {
  const message = (await ask()).choices[0].message;
  redStar(message.content);
  const again = [...picture, message, { role: "user", content: "What colour is it?" }];
  assert.ok((await ask({ messages: again, stream: null, n: null })).choices[0].message.content);
});

await check("stream", async () => {
  const chunks = await collect(await ask({ stream: true, stream_options: { include_usage: true } }));
  redStar(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""));
  assert.ok(chunks.at(-1).usage.completion_tokens > 0);
  const stream = client.chat.completions.stream(fields);
  redStar(await stream.finalContent());
  const left = client.chat.completions.stream({ ...fields, messages: weather });
  left.abort();
  await assert.rejects(left.done(), OpenAI.APIUserAbortError);
});

await check("tools", async () => {
  const message = (await ask({ messages: weather, tools: [TOOL], ...oneCall })).choices[0].message;
  const [call] = message.tool_calls;
  Weather.parse(JSON.parse(call.function.arguments));
  const result = { role: "tool", tool_call_id: call.id, content: "sunny" };
  assert.ok((await ask({ messages: [...weather, message, result], tools: [TOOL] })).choices[0].message.content);
});

await check("run_tools", async () => {
  let city = "";
  const take = (given) => {
    city = given.city;
    return "sunny";
  };
  const tool = { type: "function", function: { ...TOOL.function, parse: JSON.parse, function: take } };
  const choice = { type: "function", function: { name: "weather" } };
  const named = { ...fields, messages: weather, tools: [tool], tool_choice: choice, parallel_tool_calls: false };
  await client.chat.completions.runTools(named, { maxChatCompletions: 2 }).done();
  assert.match(city, /Rome|Oslo/);
});

await check("parse", async () => {
  const format = zodResponseFormat(Shape, "shape");
  const answer = await client.chat.completions.parse({ ...fields, response_format: format });
  Shape.parse(answer.choices[0].message.parsed);
  const again = [...picture, answer.choices[0].message, { role: "user", content: "And now?" }];
  assert.ok((await ask({ messages: again })).choices[0].message.content);
  const tools = [zodFunction({ name: "weather", parameters: Weather })];
  const called = await client.chat.completions.parse({ ...fields, messages: weather, tools, ...oneCall });
  Weather.parse(called.choices[0].message.tool_calls[0].function.parsed_arguments);
});

await check("json_object", async () => {
  const answer = await ask({ response_format: { type: "json_object" }, logit_bias: EMPTY_OBJECT });
  assert.equal(answer.choices[0].message.content, "{}");
});

await check("completions", async () => {
  const text = { model: MODEL, prompt: "What is", max_tokens: 5, temperature: 0 };
  const whole = (await client.completions.create(text)).choices[0].text;
  const chunks = await collect(await client.completions.create({ ...text, stream: true }));
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), whole);
});

await check("responses", async () => {
  const answer = await client.responses.create({ model: MODEL, input: items });
  redStar(answer.output_text);
  const next = { model: MODEL, input: "What colour is it?" };
  assert.ok((await client.responses.create({ ...next, previous_response_id: answer.id })).output_text);
  const all = [...items, ...answer.output, { role: "user", content: "What colour is it?" }];
  assert.ok((await client.responses.create({ model: MODEL, input: all })).output_text);
  const events = await collect(await client.responses.create({ model: MODEL, input: items, stream: true }));
  assert.equal(events.at(-1).type, "response.completed");
});

await check("responses_parse", async () => {
  const text = { format: zodTextFormat(Shape, "shape") };
  const answer = await client.responses.parse({ model: MODEL, input: items, text });
  Shape.parse(answer.output_parsed);
  const all = [...items, ...answer.output, { role: "user", content: "And now?" }];
  assert.ok((await client.responses.create({ model: MODEL, input: all })).output_text);
});

await check("responses_tools", async () => {
  const tools = [{ type: "function", ...TOOL.function, strict: true }];
  const input = [{ role: "user", content: "Weather?" }];
  const answer = await client.responses.create({ model: MODEL, input, tools, ...oneCall });
  const [call] = answer.output;
  Weather.parse(JSON.parse(call.arguments));
  const result = { type: "function_call_output", call_id: call.call_id, output: "sunny" };
  const second = { model: MODEL, input: [...input, ...answer.output, result], tools };
  assert.ok((await client.responses.create(second)).output_text);
});

await check("errors", async () => {
  const messages = [{ role: "user", content: TOO_LONG }];
  await assert.rejects(ask({ messages }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    return error.code === "context_length_exceeded" && Boolean(error.requestID);
  });
  await assert.rejects(client.embeddings.create({ model: MODEL, input: "x" }), OpenAI.NotFoundError);
});
