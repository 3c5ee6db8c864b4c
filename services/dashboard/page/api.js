// Questions to the server. The token stands in this origin's storage alone, and goes along as a bearer token.

const KEY = "attune-token";

export class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

/** Takes the token out of the address as soon as it is there. */
export function takeToken() {
  const given = /^#token=([^&]+)/.exec(location.hash);
  if (!given) return;
  localStorage.setItem(KEY, decodeURIComponent(given[1]));
  history.replaceState(null, "", location.pathname + "#/");
}

export function setToken(token) { localStorage.setItem(KEY, token.trim()); }

export function headers() { return { authorization: `Bearer ${localStorage.getItem(KEY) ?? ""}` }; }

export function address(path, query) {
  const pairs = new URLSearchParams();
  for (const [name, value] of Object.entries(query ?? {})) {
    if (value === null || value === undefined) continue;
    for (const one of Array.isArray(value) ? value : [value]) pairs.append(name, one);
  }
  return `/api/${path}?${pairs}`;
}

async function ask(path, query, signal) {
  const answer = await fetch(address(path, query), { headers: headers(), signal });
  if (answer.ok) return answer;
  let message = `the server answered ${answer.status}`;
  try {
    const body = await answer.json();
    message = body.error?.message ?? (body.detail ? JSON.stringify(body.detail) : message);
  } catch { /* no JSON: the status says it */ }
  throw new Refused(answer.status, message);
}

export async function get(path, query, signal) { return (await ask(path, query, signal)).json(); }

/** Rows of a dense map: {low, rows, columns, data}; null where none was kept. */
export async function getMap(query, signal) {
  try {
    const answer = await ask("map", query, signal);
    const columns = Number(answer.headers.get("x-columns")), rows = Number(answer.headers.get("x-rows"));
    return { low: query.low ?? 0, rows, columns, data: new Float32Array(await answer.arrayBuffer()) };
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}
