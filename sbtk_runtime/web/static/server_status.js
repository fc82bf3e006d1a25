// The status of the server: polled, and shown in the header.

import { ApiError, getHealth } from "./api.js";
import { byId } from "./dom.js";

/** @typedef {import("./api.js").Gallery} Gallery */
/** @typedef {import("./api.js").Health} Health */
/** @typedef {"unknown" | "ok" | "loading" | "failed" | "unreachable" | "unauthorized"} Status */

const INTERVAL_MS = { unknown: 400, loading: 400, failed: 3000, unreachable: 1500, unauthorized: 5000, ok: 20_000 };
const LABELS = {
  unknown: "Connecting",
  ok: "Ready",
  loading: "Starting",
  failed: "Error",
  unreachable: "Disconnected",
  unauthorized: "Sign-in required",
};

/** Polls the server. Dispatches "change" when the status, the generation or the problem changes. */
export class ServerMonitor extends EventTarget {
  /** @type {Status} */
  status = "unknown";
  /** @type {Health} */
  health = { status: "unknown" };
  /** @type {number | undefined} */
  #timer;
  #checks = 0;

  start() {
    document.addEventListener("visibilitychange", () => {
      if (document.visibilityState === "visible") void this.check();
    });
    window.addEventListener("online", () => void this.check());
    return this.check();
  }

  /** Checks the server now. */
  async check() {
    clearTimeout(this.#timer);
    this.#checks += 1;
    const current = this.#checks;
    const [status, health] = await fetchStatus();
    if (current !== this.#checks) return; // A later check is more recent.
    this.#update(status, health);
    clearTimeout(this.#timer);
    this.#timer = setTimeout(
      () => {
        if (document.visibilityState === "visible") void this.check();
      },
      this.health.problem ? INTERVAL_MS.failed : INTERVAL_MS[status],
    );
  }

  /**
   * Updates the status from the error of another request.
   * @param {ApiError} error
   */
  report(error) {
    if (error.code === "unreachable") this.#update("unreachable", { status: "unreachable" });
    if (error.code === "no_token") this.#update("unauthorized", { status: "unauthorized" });
    if (["unreachable", "no_token", "loading", "gallery_gone", "model_mismatch"].includes(error.code)) {
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => void this.check(), INTERVAL_MS.loading);
    }
  }

  /**
   * @param {Status} status
   * @param {Health} health
   */
  #update(status, health) {
    const isSame =
      status === this.status &&
      health.generation === this.health.generation &&
      health.is_indexing === this.health.is_indexing &&
      health.problem?.message === this.health.problem?.message;
    this.status = status;
    this.health = health;
    if (!isSame) this.dispatchEvent(new Event("change"));
  }
}

/**
 * Shows the status in the header, and the gallery, model and engine in the popover.
 * @param {ServerMonitor} monitor
 * @param {Gallery | null} gallery
 */
export function showStatus(monitor, gallery) {
  const button = byId("server-status", HTMLElement);
  const { engine, photos } = monitor.health;
  const count = photos ?? gallery?.count;
  button.dataset.status = monitor.status;
  const isReady = monitor.status === "ok" && typeof count === "number";
  const photoCount = typeof count === "number" ? `${count.toLocaleString("en")} ${count === 1 ? "photo" : "photos"}` : "";
  byId("server-label", HTMLElement).textContent = isReady ? photoCount : LABELS[monitor.status];
  const details = {
    gallery: gallery?.name,
    photos: count?.toLocaleString("en"),
    model: gallery?.model_id,
    engine: engine ? `${engine.name} ${engine.version} (${engine.precision}, ${engine.device})` : "",
  };
  for (const [name, text] of Object.entries(details)) byId(`info-${name}`, HTMLElement).textContent = text || "–";
}

/** @returns {Promise<[Status, Health]>} */
async function fetchStatus() {
  try {
    const health = await getHealth();
    return [health.status === "ok" || health.status === "loading" ? health.status : "failed", health];
  } catch (error) {
    const isUnauthorized = error instanceof ApiError && error.code === "no_token";
    const status = isUnauthorized ? "unauthorized" : "unreachable";
    return [status, { status }];
  }
}
