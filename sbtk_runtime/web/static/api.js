// Client of the HTTP API. URLs are relative, so that a reverse proxy can serve the page under any path.

/** @typedef {{ id: number, path?: string | null, path_bytes?: string | null }} Copy */
/**
 * A photo in the results. Photos that are listed without a search have no rank and no score.
 * @typedef {{ rank?: number, score?: number, id: number, path?: string | null, path_bytes?: string | null,
 *   copies?: Copy[], match?: "good" | "weak", region?: import("./region_frame.js").Region }} Hit
 */
/**
 * @typedef {{ hits: Hit[], generation: number, took_ms?: number, notices?: string[],
 *   no_close_match?: boolean }} QueryResponse
 */
/** @typedef {{ path?: string | null, path_bytes?: string | null, name: string, count: number }} Folder */
/**
 * @typedef {{ name: string, count: number, generation: number, model_id: string, folders: Folder[], command: string,
 *   index_command: string | null, bits: number | null,
 *   regions: number | null, has_dates: boolean,
 *   galleries: { name: string, is_current: boolean }[] }} Gallery
 */
/** @typedef {{ name: string, version: string, device: string, precision: string }} Engine */
/** @typedef {{ code: string, message: string, next?: string }} ErrorBody */
/**
 * @typedef {{ status: string, engine?: Engine | null, generation?: number | null, photos?: number | null,
 *   is_indexing?: boolean | null, problem?: ErrorBody | null }} Health
 */
/**
 * The result of an update.
 * @typedef {{ new: number, changed: number, moved: number, found_again: number, missing: number, unreadable: number,
 *   photos: number, seconds: number, notices: string[], warnings: string[], left_out: string[] }} IndexReport
 */
/**
 * @typedef {{ phase: "idle" | "finding" | "embedding" | "forgetting", done: number, total?: number, rate: number,
 *   jobs: number, generation?: number, photos?: number, report?: IndexReport, problem?: ErrorBody }} Indexing
 */
/**
 * @typedef {{ path?: string | null, path_bytes?: string | null, name: string, photos: number, missing: number,
 *   exists: boolean }} IndexedFolder
 */
/** @typedef {{ path?: string | null, path_bytes?: string | null, reason: string, is_searchable: boolean }} FileFailure */
/**
 * @typedef {object} Photo
 * @property {number} id
 * @property {string | null} [path]
 * @property {string | null} [path_bytes]
 * @property {string} name
 * @property {number} size_bytes
 * @property {string} modified ISO 8601
 */
/**
 * @typedef {{ width_px?: number, height_px?: number, taken?: string, camera?: string, lens?: string,
 *   exposure?: string, latitude?: number, longitude?: number, is_changed?: boolean }} Details
 */
/** @typedef {{ limit: number, offset: number } & import("./filters.js").Filter} QueryOptions */

const TIMEOUT_MS = 20_000;
const EXACT_DIGITS = 15;
// In a string of the response, the quotation marks would follow backslashes.
const LONG_IDS = /("id":\s*)(\d{16,})/g;

/** An error response. `code` is the server's, or "unreachable" if no response came. */
export class ApiError extends Error {
  /**
   * @param {string} code
   * @param {string} message
   * @param {{ next?: string, retryMs?: number }} [options]
   */
  constructor(code, message, { next = "", retryMs = 0 } = {}) {
    super(message);
    this.code = code;
    this.next = next;
    this.retryMs = retryMs;
  }
}

/**
 * Returns whether what to do about a problem is a command to type.
 * @param {string} next
 */
export function isCommand(next) {
  return /^(sbtk|pip|python) /.test(next);
}

/**
 * Returns a problem, and what to do about it, as sentences.
 * @param {{ message: string, next?: string }} problem
 * @returns {string}
 */
export function problemText({ message, next = "" }) {
  if (next === "") return sentence(message);
  return `${sentence(message)} ${isCommand(next) ? `To fix this, run: ${next}` : sentence(next)}`;
}

/**
 * @param {string} text
 * @returns {string}
 */
function sentence(text) {
  // A path keeps its case, and a name in quotation marks may end with a full stop.
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?:…]$/.test(text) ? "" : "."}`;
}

/**
 * Searches with an image.
 * @param {Blob} image
 * @param {"sketch" | "photo"} kind
 * @param {readonly number[]} unlikes photos of the gallery that are not wanted
 * @param {QueryOptions} options
 * @param {AbortSignal} signal
 * @returns {Promise<QueryResponse>}
 */
export function query(image, kind, unlikes, options, signal) {
  const init = { method: "POST", body: image, headers: { "Content-Type": image.type }, signal };
  return requestJson(`v1/query?as=${kind}${unlikesParameter(unlikes)}&${parameters(options)}`, init);
}

/**
 * Searches with a photo of the gallery, or a part of it.
 * @param {number} id
 * @param {string} region x, y, width and height; "" for the whole photo
 * @param {QueryOptions} options
 * @param {AbortSignal} signal
 * @returns {Promise<QueryResponse>}
 */
export function similar(id, region, options, signal) {
  const part = region === "" ? "" : `region=${region}&`;
  return requestJson(`v1/photos/${id}/similar?${part}${parameters(options)}`, { signal });
}

/**
 * Searches with several photos of the gallery.
 * @param {readonly number[]} likes
 * @param {readonly number[]} unlikes
 * @param {QueryOptions} options
 * @param {AbortSignal} signal
 * @returns {Promise<QueryResponse>}
 */
export function similarToSeveral(likes, unlikes, options, signal) {
  return requestJson(`v1/similar?like=${likes}${unlikesParameter(unlikes)}&${parameters(options)}`, { signal });
}

/**
 * Lists photos, newest first.
 * @param {QueryOptions} options
 * @param {AbortSignal} signal
 * @returns {Promise<QueryResponse>}
 */
export async function recentPhotos(options, signal) {
  const { photos, generation } = await requestJson(`v1/photos?${parameters(options)}`, { signal });
  return { hits: photos, generation };
}

/**
 * Returns what a photo's file says about itself.
 * @param {number} id
 * @param {AbortSignal} signal
 * @returns {Promise<Details>}
 */
export function getDetails(id, signal) {
  return requestJson(`v1/photos/${id}/details`, { signal });
}

/**
 * @param {number} id
 * @param {AbortSignal} [signal]
 * @returns {Promise<Photo>}
 */
export function getPhoto(id, signal) {
  return requestJson(`v1/photos/${id}`, { signal });
}

/** @returns {Promise<Gallery>} */
export function getGallery() {
  return requestJson("v1/gallery", {});
}

/** @returns {Promise<{ folders: IndexedFolder[], can_change: boolean, can_show: boolean }>} */
export function getFolders() {
  return requestJson("v1/folders", {});
}

/**
 * @param {number} offset
 * @returns {Promise<{ failures: FileFailure[], count: number }>}
 */
export function getFailures(offset) {
  return requestJson(`v1/failures?limit=200&offset=${offset}`, {});
}

/** @returns {Promise<Indexing>} */
export function getIndexing() {
  return requestJson("v1/indexing", {});
}

/**
 * Indexes a folder, or all folders of the gallery again.
 * @param {{ under?: string, regions?: string }} [options] the folder, and how many regions of each photo to keep
 * @returns {Promise<Indexing>}
 */
export function startIndexing(options = {}) {
  const query = new URLSearchParams(options).toString();
  return requestJson(`v1/indexing${query && `?${query}`}`, { method: "POST" });
}

/**
 * Removes a folder's photos from the gallery. No file is deleted.
 * @param {string} path
 * @returns {Promise<Indexing>}
 */
export function forgetFolder(path) {
  return requestJson(`v1/folders?${new URLSearchParams({ under: path })}`, { method: "DELETE" });
}

/**
 * Returns the server's status. An engine that is not ready is a status, not an error.
 * @returns {Promise<Health>}
 */
export async function getHealth() {
  const response = await request("healthz", {});
  const body = await parseJson(response);
  if (body !== null && typeof body.status === "string") return body;
  throw errorFrom(response, body);
}

/**
 * Shows a photo's folder in the file manager of the server's machine.
 * @param {number} id
 * @returns {Promise<{ folder: string }>}
 */
export function showFolder(id) {
  return requestJson(`v1/photos/${id}/folder`, { method: "POST" });
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

/** @param {readonly number[]} ids */
function unlikesParameter(ids) {
  return ids.length > 0 ? `&unlike=${ids}` : "";
}

/** @param {QueryOptions} options */
function parameters(options) {
  const given = Object.entries(options).filter(([, value]) => value !== "");
  return new URLSearchParams(given.map(([name, value]) => [name, `${value}`])).toString();
}

/**
 * @param {string} url
 * @param {RequestInit} init
 * @returns {Promise<any>}
 * @throws {ApiError}
 */
async function requestJson(url, init) {
  const response = await request(url, init);
  const body = await parseJson(response);
  if (response.ok && body !== null) return body;
  throw errorFrom(response, body);
}

/**
 * @param {string} url
 * @param {RequestInit} init
 * @returns {Promise<Response>}
 */
async function request(url, init) {
  const timeout = AbortSignal.timeout(TIMEOUT_MS);
  const signal = init.signal ? AbortSignal.any([init.signal, timeout]) : timeout;
  try {
    return await fetch(url, { ...init, signal });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new ApiError("unreachable", "The server did not respond.");
  }
}

/**
 * Returns an id from a URL or an attribute as `parseJson` does.
 * @param {string} text
 * @returns {number} declared as one; a string if a number cannot hold all its digits
 */
export function idOf(text) {
  return /** @type {number} */ (text.length > EXACT_DIGITS ? /** @type {unknown} */ (text) : Number(text));
}

/**
 * Ids of photos in a database have up to 19 digits, of which a number would lose some. They stay strings.
 * @param {Response} response
 * @returns {Promise<any>} null if the body is not JSON, such as the error page of a proxy
 */
async function parseJson(response) {
  try {
    return JSON.parse((await response.text()).replace(LONG_IDS, '$1"$2"'));
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    return null;
  }
}

/**
 * @param {Response} response
 * @param {any} body
 * @returns {ApiError}
 */
function errorFrom(response, body) {
  const error = body?.error;
  if (typeof error?.code !== "string") {
    const isUnreachable = [502, 503, 504].includes(response.status) || response.ok;
    return isUnreachable
      ? new ApiError("unreachable", "The server did not respond.")
      : new ApiError("internal", `The server returned status ${response.status} without an error message.`);
  }
  // The server has another token now: its page has a form for it. The sketch is kept.
  if (error.code === "no_token") location.assign("./");
  const seconds = Number(response.headers.get("Retry-After") ?? 0);
  const retryMs = Number.isFinite(seconds) ? seconds * 1000 : 0;
  return new ApiError(error.code, error.message, { next: error.next ?? "", retryMs });
}
