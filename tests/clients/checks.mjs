// What the client programs in JavaScript share, as checks.py for those in Python: `check(name, function)` runs
// the function and prints a line of JSON.
import { readFileSync } from "node:fs";
import assert from "node:assert/strict";
import { z } from "zod";

export const ROOT = process.argv[2];
export const URL_V1 = `${ROOT}/v1`;
export const MODEL = "embedded-shapes";
export const KEY = "none";
export const PICTURE = readFileSync(process.argv[3]);
export const BASE64 = PICTURE.toString("base64");
export const DATA_URL = `data:image/png;base64,${BASE64}`;
export const QUESTION = "What shape is in the picture?";
export const TOO_LONG = "hello ".repeat(6000);
// `logit_bias` for `{` and `}`: an object that ends at once.
export const EMPTY_OBJECT = { 90: 100, 92: 100 };
export const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string", enum: ["Rome", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};
export const TOOL = { type: "function", function: { name: "weather", parameters: PARAMETERS } };
export const Shape = z.object({ colour: z.enum(["red", "blue"]), corners: z.union([z.literal(3), z.literal(5)]) });
export const Weather = z.object({ city: z.enum(["Rome", "Oslo"]) });

export const redStar = (text) => assert.match(text ?? "", /star/);

export async function collect(stream) {
  const found = [];
  for await (const one of stream) found.push(one);
  return found;
}

export async function check(name, run) {
  const start = performance.now();
  let error = null;
  try {
    await run();
  } catch (caught) {
    error = `${caught?.stack ?? caught} ${JSON.stringify(caught?.data ?? caught?.error ?? null)}`.slice(0, 4000);
  }
  const seconds = Math.round((performance.now() - start) / 10) / 100;
  console.log(JSON.stringify({ check: name, error, seconds }));
}
