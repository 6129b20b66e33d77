// Reads a stream of server-sent events: the `data` of each.

/**
 * @param {ReadableStream<Uint8Array>} stream
 * @returns {AsyncGenerator<string>}
 */
export async function* serverSentEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  /** @type {string[]} */
  let data = [];
  let isOver = false;
  try {
    while (!isOver) {
      const { value, done } = await reader.read();
      isOver = done;
      rest += decoder.decode(value, { stream: !done });
      const lines = rest.split(/\r\n|\n|\r(?!$)/); // a \r at the end may be the first half of \r\n
      rest = done ? "" : (lines.pop() ?? "");
      for (const line of lines) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    if (!isOver) reader.cancel().catch(() => {}); // a reader that leaves early ends the request
  }
}
