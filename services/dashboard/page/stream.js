// The server's events of one run. One tab of a browser holds the connection and hands events to the others, since a
// browser opens six connections to a server at most; when it closes, another goes on where it was.

import { address, headers } from "./api.js";

/** Calls `told(kind, data)`; returns what ends it. */
export function follow(run, told) {
  const ended = new AbortController();
  let last = null;
  const shared = Boolean(navigator.locks && window.BroadcastChannel);
  const channel = shared ? new BroadcastChannel(`attune ${run}`) : null;
  const hear = (message) => { last = message.id ?? last; told(message.kind, message.data); };
  if (channel) channel.onmessage = ({ data }) => hear(data);
  const hold = async () => {
    while (!ended.signal.aborted) {
      try {
        await read(run, last, ended.signal, (message) => { channel?.postMessage(message); hear(message); });
      } catch (error) {
        if (ended.signal.aborted) return;
        hear({ kind: "lost", data: { message: String(error.message ?? error) } });
      }
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  };
  if (shared) navigator.locks.request(`attune ${run}`, { signal: ended.signal }, hold).catch(() => {});
  else hold();
  return () => { ended.abort(); channel?.close(); };
}

async function read(run, last, signal, hear) {
  const more = last ? { "last-event-id": last } : {};
  const answer = await fetch(address("stream", { run }), { headers: { ...headers(), ...more }, signal });
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const message = { kind: "message", data: null, id: null };
      for (const line of block.split("\n")) {
        const at = line.indexOf(": ");
        const name = line.slice(0, at), text = line.slice(at + 2);
        if (name === "event") message.kind = text;
        else if (name === "id") message.id = text;
        else if (name === "data") message.data = JSON.parse(text);
      }
      if (message.data !== null) hear(message);
    }
  }
}
