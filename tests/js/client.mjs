// A client of the pipeline, written from docs/wire.md: asks one question about one picture and prints what comes as JSON.
//
//     node client.mjs RUN_DIR QUESTION PICTURE [N] [PROTOCOL] [FORM]
//
// FORM is JSON: {"schema": a JSON schema that the answer follows} or {"tool": a function that the model must call}.

import { randomBytes, randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { decode, encode } from "@msgpack/msgpack";
import { Push, Subscriber } from "zeromq";

const [runDir, question, picture, n = "1", protocol = "7", form = "{}"] = process.argv.slice(2);
const clientId = randomBytes(16);
const requestId = randomUUID();
const address = (name) => `ipc://${runDir}/${name}`;

const control = new Subscriber();
control.connect(address("control"));
control.subscribe("");
const [, first] = await control.receive();
const state = decode(first);
const epochOf = (role, rank) => state.workers.find(({ worker }) => worker[0] === role && worker[1] === rank).epoch;

const outputs = new Subscriber();
for (const lead of state.leads ?? [0]) outputs.connect(address(`outputs.${lead}.${epochOf("llm", lead)}`));
outputs.subscribe(clientId);
const ingest = new Push();
ingest.connect(address(`ingest.${epochOf("preprocess", 0)}`));

// What the answer must be: the sampling's `grammar`.
const { schema, tool } = JSON.parse(form);
const callOf = ({ name, parameters }) => ({
  type: "tag", begin: `<tool_call>\n{"name": ${JSON.stringify(name)}, "arguments": `,
  content: { type: "json_schema", json_schema: parameters }, end: "}\n</tool_call>",
});
const grammarOf = () => {
  if (schema) return { kind: "json_schema", source: JSON.stringify(schema) };
  if (!tool) return null;
  const source = JSON.stringify({ type: "structural_tag", format: callOf(tool.function) });
  return { kind: "structural_tag", source, field: "tool_choice" };
};

const hello = () => ingest.send(encode({ type: "Hello", client_id: clientId, protocol: Number(protocol) }));
const greeting = setInterval(hello, 100);
const welcomed = new Set();
let welcome;
while (welcomed.size < (state.leads ?? [0]).length) {
  const [, frame] = await outputs.receive();
  const message = decode(frame);
  if (message.type === "Welcome") {
    welcome = message;
    welcomed.add(message.sender[1]);
  }
}
clearInterval(greeting);

await ingest.send([
  encode({
    type: "SubmitRequest", client_id: clientId, request_id: requestId, attempt: 1,
    prompt: {
      type: "chat",
      messages: [{ role: "user", content: [{ type: "image", frame: 0 }, { type: "text", text: question }] }],
      tools: tool ? Buffer.from(JSON.stringify([tool])) : Buffer.alloc(0),
    },
    sampling: { temperature: 1, seed: 1, max_tokens: form === "{}" ? 16 : 200, n: Number(n), grammar: grammarOf() },
  }),
  readFileSync(picture),
]);

const choices = Array.from({ length: Number(n) }, () => ({ token_ids: [], finish_reason: null }));
let numPromptTokens = 0;
let error;
while (error === undefined && choices.some((choice) => choice.finish_reason === null)) {
  const [, frame] = await outputs.receive();
  const message = decode(frame);
  if (message.type === "Accepted" && message.request_id === requestId) numPromptTokens = message.num_prompt_tokens;
  if (message.type === "RequestFailed" && message.request_id === requestId) error = message.error;
  if (message.type !== "TokenOutputs") continue;
  for (const [id, attempt, offset, ids, finishReason, , , index = 0] of message.outputs) {
    const choice = choices[index];
    if (id !== requestId || attempt !== 1 || offset !== choice.token_ids.length) continue;
    const view = new DataView(ids.buffer, ids.byteOffset, ids.byteLength);
    for (let at = 0; at < ids.byteLength; at += 4) choice.token_ids.push(view.getInt32(at, true));
    choice.finish_reason = finishReason;
  }
}
console.log(JSON.stringify({ model: welcome.model_name, prompt_tokens: numPromptTokens, choices, error }));
for (const socket of [control, outputs, ingest]) socket.close();
