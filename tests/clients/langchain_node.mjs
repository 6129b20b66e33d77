// @langchain/openai: its chat model, by both of OpenAI's routes, and its older model of texts.
import assert from "node:assert/strict";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { ChatOpenAI, OpenAI } from "@langchain/openai";
import { BASE64, DATA_URL, EMPTY_OBJECT, KEY, MODEL, QUESTION, Shape, TOO_LONG, TOOL, URL_V1 } from "./checks.mjs";
import { Weather, check, collect, redStar } from "./checks.mjs";
import { z } from "zod";

const options = { model: MODEL, apiKey: KEY, maxRetries: 0, temperature: 0, configuration: { baseURL: URL_V1 } };
const chat = (more) => new ChatOpenAI({ ...options, maxTokens: 200, ...more });
const text = { type: "text", text: QUESTION };
const picture = new HumanMessage({ content: [{ type: "image_url", image_url: { url: DATA_URL } }, text] });
const standard = new HumanMessage({
  contentBlocks: [{ type: "image", data: BASE64, mimeType: "image/png" }, text],
});
const weather = new HumanMessage("How is the weather?");
const oneCall = { tool_choice: "any", parallel_tool_calls: false };

await check("chat", async () => {
  const answer = await chat().invoke([picture]);
  redStar(answer.text);
  assert.ok(answer.usage_metadata.output_tokens > 0);
  redStar((await chat().invoke([standard])).text);
  assert.ok((await chat().invoke([picture, answer, new HumanMessage("What colour is it?")])).text);
});

await check("stream", async () => {
  const chunks = await collect(await chat().stream([picture]));
  redStar(chunks.map((chunk) => chunk.text).join(""));
});

await check("tools", async () => {
  const answer = await chat().bindTools([TOOL], oneCall).invoke([weather]);
  const [call] = answer.tool_calls;
  Weather.parse(call.args);
  const result = new ToolMessage({ content: "sunny", tool_call_id: call.id });
  assert.ok((await chat().bindTools([TOOL]).invoke([weather, answer, result])).text);
});

await check("structured", async () => {
  for (const method of ["jsonSchema", "functionCalling"]) {
    Shape.parse(await chat().withStructuredOutput(Shape, { method }).invoke([picture]));
  }
  const biased = chat({ modelKwargs: { logit_bias: EMPTY_OBJECT } });
  const asked = biased.withStructuredOutput(z.object({}), { method: "jsonMode" });
  assert.deepEqual(await asked.invoke([picture]), {});
});

await check("responses", async () => {
  const model = chat({ useResponsesApi: true });
  const answer = await model.invoke([picture]);
  redStar(answer.text);
  assert.ok((await model.invoke([picture, answer, new HumanMessage("What colour is it?")])).text);
  const named = { type: "function", function: { name: "weather" } }; // it does not send "any" on this route
  const called = await model.bindTools([TOOL], { ...oneCall, tool_choice: named }).invoke([weather]);
  Weather.parse(called.tool_calls[0].args);
  const result = new ToolMessage({ content: "sunny", tool_call_id: called.tool_calls[0].id });
  assert.ok((await model.invoke([weather, called, result])).text);
});

await check("completions", async () => {
  assert.ok(await new OpenAI({ ...options, maxTokens: 5 }).invoke("What is"));
});

await check("overflow", async () => {
  await assert.rejects(chat().invoke(TOO_LONG), (error) => {
    assert.match(error.name, /ContextOverflow/, `${error.name} ${error.lc_error_code}`);
    return true;
  });
});
