// How the server is: asked often while it is not well, seldom while it is.

import { Problem, health } from "./api.js";

/** @typedef {import("./api.js").Health} Health */
/** @typedef {"unknown" | "ok" | "loading" | "failed" | "gone" | "locked"} Condition */

const PAUSE_MS = { unknown: 400, loading: 400, failed: 3000, gone: 1500, locked: 5000, ok: 20_000 };

/** Dispatches "change" when the condition, the generation or the trouble is another. */
export class Watch extends EventTarget {
  /** @type {Condition} */
  condition = "unknown";
  /** @type {Health} */
  health = { status: "unknown" };
  /** @type {number | undefined} */
  #timer;
  #looks = 0;

  start() {
    document.addEventListener("visibilitychange", () => {
      if (document.visibilityState === "visible") void this.look();
    });
    window.addEventListener("online", () => void this.look());
    return this.look();
  }

  /** Asks now. */
  async look() {
    clearTimeout(this.#timer);
    this.#looks += 1;
    const mine = this.#looks;
    const [condition, health_] = await found();
    if (mine !== this.#looks) return; // A newer look knows better.
    this.#become(condition, health_);
    clearTimeout(this.#timer);
    this.#timer = setTimeout(
      () => {
        if (document.visibilityState === "visible") void this.look();
      },
      this.health.problem ? PAUSE_MS.failed : PAUSE_MS[condition],
    );
  }

  /** Takes note of a problem that another request met. @param {Problem} problem */
  met(problem) {
    if (problem.code === "gone") this.#become("gone", { status: "gone" });
    if (problem.code === "no_token") this.#become("locked", { status: "locked" });
    if (["gone", "no_token", "loading", "gallery_gone", "model_mismatch"].includes(problem.code)) {
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => void this.look(), PAUSE_MS.loading);
    }
  }

  /**
   * @param {Condition} condition
   * @param {Health} health_
   */
  #become(condition, health_) {
    const isSame =
      condition === this.condition &&
      health_.generation === this.health.generation &&
      health_.problem?.message === this.health.problem?.message;
    this.condition = condition;
    this.health = health_;
    if (!isSame) this.dispatchEvent(new Event("change"));
  }
}

/** @returns {Promise<[Condition, Health]>} */
async function found() {
  try {
    const health_ = await health();
    return [conditionOf(health_), health_];
  } catch (error) {
    const isLocked = error instanceof Problem && error.code === "no_token";
    return [isLocked ? "locked" : "gone", { status: "gone" }];
  }
}

/**
 * @param {Health} health_
 * @returns {Condition}
 */
function conditionOf(health_) {
  if (health_.status === "ok" || health_.status === "loading") return health_.status;
  return "failed";
}
