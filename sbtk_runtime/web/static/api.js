// The server's answers. Addresses are relative, so that a reverse proxy may put the page anywhere.

/** @typedef {{ id: number, path?: string | null, path_bytes?: string | null }} Copy */
/** @typedef {{ rank: number, score: number, id: number, path?: string | null, path_bytes?: string | null, copies?: Copy[] }} Hit */
/** @typedef {{ hits: Hit[], generation: number, engine: unknown, took_ms: number, notices?: string[] }} Answer */
/** @typedef {{ path?: string | null, path_bytes?: string | null, name: string, count: number }} Folder */
/** @typedef {{ name: string, count: number, generation: number, folders: Folder[] }} Gallery */
/** @typedef {{ name: string, version?: string, device?: string, precision?: string }} Engine */
/** @typedef {{ code: string, message: string, next?: string }} Trouble */
/** @typedef {{ status: string, engine?: Engine | null, generation?: number | null, photos?: number | null, problem?: Trouble | null }} Health */
/**
 * @typedef {object} Photo
 * @property {number} id
 * @property {string | null} [path]
 * @property {string | null} [path_bytes]
 * @property {string} name
 * @property {number} size_bytes
 * @property {string} modified ISO 8601
 */
/** @typedef {{ k: number, under: string }} Wanted */

const PATIENCE_MS = 20_000;

/** An answer that is none. `code` is the server's, or "gone" where no server answered. */
export class Problem extends Error {
  /**
   * @param {string} code
   * @param {string} message
   * @param {{ next?: string, retryMs?: number }} [more]
   */
  constructor(code, message, { next = "", retryMs = 0 } = {}) {
    super(message);
    this.code = code;
    this.next = next;
    this.retryMs = retryMs;
  }
}

/**
 * The photos that look like an image.
 * @param {Blob} image
 * @param {"sketch" | "photo"} kind
 * @param {Wanted} wanted
 * @param {AbortSignal} signal
 * @returns {Promise<Answer>}
 */
export function query(image, kind, wanted, signal) {
  const options = { method: "POST", body: image, headers: { "Content-Type": image.type }, signal };
  return asked(`v1/query?as=${kind}&${parameters(wanted)}`, options);
}

/**
 * The photos that look like one of the gallery.
 * @param {number} id
 * @param {Wanted} wanted
 * @param {AbortSignal} signal
 * @returns {Promise<Answer>}
 */
export function similar(id, wanted, signal) {
  return asked(`v1/photos/${id}/similar?${parameters(wanted)}`, { signal });
}

/**
 * @param {number} id
 * @param {AbortSignal} [signal]
 * @returns {Promise<Photo>}
 */
export function photo(id, signal) {
  return asked(`v1/photos/${id}`, { signal });
}

/** @returns {Promise<Gallery>} */
export function gallery() {
  return asked("v1/gallery", {});
}

/**
 * How the server is; an engine that is not ready yet is no problem here.
 * @returns {Promise<Health>}
 */
export async function health() {
  const response = await fetched("healthz", {});
  const body = await jsonOf(response);
  if (body !== null && typeof body.status === "string") return body;
  throw problemOf(response, body);
}

/**
 * @param {number} id
 * @param {number} sizePx 180, 360, 720 or 1600
 */
export function thumbnailUrl(id, sizePx) {
  return `v1/photos/${id}/thumbnail?size=${sizePx}`;
}

/** @param {number} id */
export function fileUrl(id) {
  return `v1/photos/${id}/file`;
}

/** @param {Wanted} wanted */
function parameters({ k, under }) {
  return new URLSearchParams(under === "" ? { k: `${k}` } : { k: `${k}`, under }).toString();
}

/**
 * @param {string} address
 * @param {RequestInit} options
 * @returns {Promise<any>}
 */
async function asked(address, options) {
  const response = await fetched(address, options);
  const body = await jsonOf(response);
  if (response.ok && body !== null) return body;
  throw problemOf(response, body);
}

/**
 * @param {string} address
 * @param {RequestInit} options
 * @returns {Promise<Response>}
 */
async function fetched(address, options) {
  const patience = AbortSignal.timeout(PATIENCE_MS);
  const signal = options.signal ? AbortSignal.any([options.signal, patience]) : patience;
  try {
    return await fetch(address, { ...options, signal });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Problem("gone", "The server does not answer.");
  }
}

/**
 * @param {Response} response
 * @returns {Promise<any>} null for what is no JSON, as from a proxy whose server is gone
 */
async function jsonOf(response) {
  try {
    return await response.json();
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    return null;
  }
}

/**
 * @param {Response} response
 * @param {any} body
 * @returns {Problem}
 */
function problemOf(response, body) {
  const trouble = body?.error;
  if (typeof trouble?.code !== "string") {
    const isGone = [502, 503, 504].includes(response.status) || response.ok;
    return isGone
      ? new Problem("gone", "The server does not answer.")
      : new Problem("fault", `The server answered ${response.status}, and not why.`);
  }
  const seconds = Number(response.headers.get("Retry-After") ?? 0);
  const retryMs = Number.isFinite(seconds) ? seconds * 1000 : 0;
  return new Problem(trouble.code, trouble.message, { next: trouble.next ?? "", retryMs });
}
