// @anthropic-ai/sdk: messages and counts.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { BASE64, KEY, MODEL, PARAMETERS, QUESTION, ROOT, Shape, TOO_LONG, Weather } from "./checks.mjs";
import { check, collect, redStar } from "./checks.mjs";

const client = new Anthropic({ baseURL: ROOT, apiKey: KEY, maxRetries: 0, timeout: 60_000 });
const source = { type: "base64", media_type: "image/png", data: BASE64 };
const picture = [
  {
    role: "user",
    content: [
      { type: "image", source },
      { type: "text", text: QUESTION },
    ],
  },
];
const weather = [{ role: "user", content: "How is the weather?" }];
const tools = [{ name: "weather", input_schema: PARAMETERS }];
const oneCall = { tool_choice: { type: "any", disable_parallel_tool_use: true } };
const fields = { model: MODEL, max_tokens: 200, messages: picture };
const ask = (more) => client.messages.create({ ...fields, ...more });

await check("message", async () => {
  const answer = await ask({ system: "Be short." });
  redStar(answer.content[0].text);
  const again = [...picture, { role: "assistant", content: answer.content }, { role: "user", content: "And now?" }];
  assert.ok((await ask({ messages: again })).content[0].text);
  assert.equal((await collect(client.models.list()))[0].id, MODEL);
});

await check("stream", async () => {
  redStar(await client.messages.stream(fields).finalText());
  const events = await collect(await ask({ stream: true }));
  assert.equal(events.at(-1).type, "message_stop");
});

await check("tools", async () => {
  const answer = await ask({ messages: weather, tools, ...oneCall });
  assert.equal(answer.stop_reason, "tool_use");
  const [call] = answer.content;
  Weather.parse(call.input);
  const result = { type: "tool_result", tool_use_id: call.id, content: "sunny" };
  const turns = [{ role: "assistant", content: answer.content }, { role: "user", content: [result] }];
  assert.ok((await ask({ messages: [...weather, ...turns], tools })).content[0].text);
  const message = await client.messages.stream({ ...fields, messages: weather, tools, ...oneCall }).finalMessage();
  Weather.parse(message.content[0].input);
});

await check("parse", async () => {
  const answer = await client.messages.parse({ ...fields, output_config: { format: zodOutputFormat(Shape) } });
  Shape.parse(answer.parsed_output);
});

await check("count", async () => {
  const counted = await client.messages.countTokens({ model: MODEL, messages: picture });
  const { usage } = await ask();
  assert.equal(counted.input_tokens, usage.input_tokens + usage.cache_read_input_tokens);
});

await check("errors", async () => {
  const messages = [{ role: "user", content: TOO_LONG }];
  await assert.rejects(ask({ messages }), (error) => {
    assert.ok(error.requestID);
    return error instanceof Anthropic.BadRequestError;
  });
});
