// One line about the gallery and the engine.

import { byId } from "./page.js";

/** @typedef {import("./api.js").Gallery} Gallery */
/** @typedef {import("./health.js").Watch} Watch */

const CONDITIONS = {
  unknown: "Connecting",
  ok: "Ready",
  loading: "Starting",
  failed: "Not working",
  gone: "No server",
  locked: "Locked",
};

/**
 * @param {Watch} watch
 * @param {Gallery | null} gallery
 */
export function showServer(watch, gallery) {
  const line = byId("server", HTMLElement);
  const { engine, photos } = watch.health;
  const count = photos ?? gallery?.count;
  line.dataset.condition = watch.condition;
  const isOk = watch.condition === "ok" && typeof count === "number";
  byId("server-text", HTMLElement).textContent = isOk
    ? `${count.toLocaleString("en")} ${count === 1 ? "photo" : "photos"}`
    : CONDITIONS[watch.condition];
  const facts = [gallery?.name, engine?.name, engine?.precision, engine?.device];
  byId("server-more", HTMLElement).textContent = isOk ? facts.filter(Boolean).join(" · ") : "";
}
