// Vercel's AI SDK: the provider for such servers, and OpenAI's own, whose default is the Responses API.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { DATA_URL, KEY, MODEL, PICTURE, QUESTION, Shape, TOO_LONG, URL_V1, Weather } from "./checks.mjs";
import { check, collect, redStar } from "./checks.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const settings = { baseURL: URL_V1, apiKey: KEY };
const compatible = createOpenAICompatible({ ...settings, name: "ours", includeUsage: true, supportsStructuredOutputs: true });
const openai = createOpenAI(settings);
const models = [compatible(MODEL), openai.chat(MODEL), openai(MODEL)];
const options = { maxRetries: 0, maxOutputTokens: 200, temperature: 0 };
const turn = (part) => [{ role: "user", content: [part, { type: "text", text: QUESTION }] }];
const picture = turn({ type: "image", image: PICTURE });
const again = { role: "user", content: "What colour is it?" };
const weather = tool({ description: "The weather", inputSchema: Weather, execute: ({ city }) => `sunny in ${city}` });

await check("text", async () => {
  for (const model of models) {
    const answer = await generateText({ ...options, model, messages: picture });
    redStar(answer.text);
    assert.ok(answer.usage.outputTokens > 0);
    const messages = [...picture, ...answer.response.messages, again];
    assert.ok((await generateText({ ...options, model, messages })).text);
  }
});

await check("pictures", async () => {
  const file = turn({ type: "file", data: PICTURE, mediaType: "image/png" });
  for (const messages of [file, turn({ type: "image", image: DATA_URL })]) {
    redStar((await generateText({ ...options, model: models[0], messages })).text);
  }
});

await check("stream", async () => {
  for (const model of models) {
    const streamed = streamText({ ...options, model, messages: picture });
    redStar((await collect(streamed.textStream)).join(""));
    assert.ok((await streamed.usage).outputTokens > 0);
  }
});

await check("tools", async () => {
  for (const model of [models[0], models[2]]) {
    const asked = { ...options, model, tools: { weather }, prompt: "How is the weather?" };
    const serial = { ours: { parallel_tool_calls: false }, openai: { parallelToolCalls: false } };
    const forced = { ...asked, toolChoice: "required", providerOptions: serial };
    const first = await generateText({ ...forced, stopWhen: stepCountIs(1) });
    Weather.parse(first.toolCalls[0].input);
    const messages = [{ role: "user", content: asked.prompt }, ...first.response.messages];
    const { prompt, ...rest } = asked;
    assert.ok((await generateText({ ...rest, messages })).text);
  }
});

await check("tools_streamed", async () => {
  const forced = { toolChoice: { type: "tool", toolName: "weather" }, prompt: "Weather?", stopWhen: stepCountIs(1) };
  const streamed = streamText({ ...options, ...forced, model: models[0], tools: { weather } });
  Weather.parse((await streamed.toolCalls)[0].input);
});

await check("object", async () => {
  for (const model of [models[0], models[2]]) {
    Shape.parse((await generateObject({ ...options, model, schema: Shape, messages: picture })).object);
  }
  const streamed = streamObject({ ...options, model: models[0], schema: Shape, messages: picture });
  Shape.parse((await collect(streamed.partialObjectStream)).at(-1));
  const output = Output.object({ schema: Shape });
  Shape.parse((await generateText({ ...options, model: models[0], output, messages: picture })).output);
});

await check("completion", async () => {
  assert.ok((await generateText({ ...options, model: compatible.completionModel(MODEL), prompt: "What is" })).text);
});

await check("reasoning_effort", async () => {
  const providerOptions = { ours: { reasoningEffort: "low" } };
  redStar((await generateText({ ...options, model: models[0], messages: picture, providerOptions })).text);
});

await check("errors", async () => {
  for (const model of models) {
    const asked = generateText({ ...options, model, prompt: TOO_LONG });
    await assert.rejects(asked, (error) => APICallError.isInstance(error) && /maximum context length/.test(error.message));
  }
});
