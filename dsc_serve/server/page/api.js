// The calls that the page makes. Addresses are relative to the page's own, so any path prefix is kept.

const KEY = "dsc-serve.key";

function storage() {
  try {
    return window.sessionStorage;
  } catch {
    return null; // a browser that lets pages keep nothing
  }
}

let current = storage()?.getItem(KEY) ?? "";

/** The API key; the tab forgets it when it closes. */
export const key = {
  get: () => current,
  set(value) {
    current = value;
    if (value) storage()?.setItem(KEY, value);
    else storage()?.removeItem(KEY);
  },
};

/** An answer that is an error: its status, and the field to blame where there is one. */
export class ApiError extends Error {
  constructor(status, body) {
    const error = body?.error ?? {};
    super(error.message ?? `the server answered with status ${status}`);
    this.status = status;
    this.param = error.param ?? null;
  }
}

export const address = (path) => new URL(path, document.baseURI).href;

/** A GET, or a POST of `body` as JSON. Throws ApiError, or what fetch throws. */
export async function call(path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(address(path), {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
    cache: "no-store",
  });
  if (response.ok) return response;
  throw new ApiError(response.status, await response.json().catch(() => null));
}

/** The objects of a stream of server-sent events, in pieces cut anywhere. Throws ApiError where one is an error. */
export async function* events(pieces) {
  let rest = "";
  for await (const piece of pieces) {
    rest += piece;
    const whole = rest.split("\n\n");
    rest = whole.pop();
    for (const event of whole) {
      const data = event.startsWith("data: ") ? event.slice(6) : null;
      if (data === "[DONE]") return;
      if (data === null) continue;
      const told = JSON.parse(data);
      if (told.error) throw new ApiError(200, told);
      yield told;
    }
  }
  throw new Error("the answer broke off before its end");
}

/** The pieces of an answer's body as text. */
export async function* texts(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
