// The message in place of results: how to start, or what is wrong and how to fix it.

import { isCommand } from "./api.js";
import { announce, byId } from "./dom.js";

/** @typedef {import("./api.js").Health} Health */
/** @typedef {import("./server_status.js").Status} Status */
/**
 * @typedef {object} Message
 * @property {"loading" | "error" | "empty"} kind
 * @property {string} title
 * @property {string} text
 * @property {string} [command] to type in a terminal
 * @property {boolean} [canRetry]
 * @property {boolean} [canAdd] whether folders are added on the page Collection
 */

/** @type {Message} */
export const FIRST_PHOTOS = {
  kind: "loading",
  title: "Looking at your photos",
  text: "They appear here as they become searchable. You can already draw.",
};

/** @type {Message} */
export const EMPTY_FOLDER = {
  kind: "empty",
  title: "No photos in this folder",
  text: "Choose another folder, or all folders.",
};

/** @type {Message} */
export const EMPTY_DAYS = {
  kind: "empty",
  title: "No photos of these days",
  text: "Choose other days, or all dates.",
};

/** @type {Message} */
export const NO_OTHER_PHOTO = { kind: "empty", title: "No similar photos", text: "The gallery has no other photos." };

/** @type {Message} */
export const PHOTO_NOT_FOUND = {
  kind: "error",
  title: "This photo is no longer in the gallery",
  text: "Go back to the sketch, or draw a new one.",
};

let lastTitle = "";

/**
 * Returns the message for a gallery without photos.
 * @param {string | null} command that indexes photos into it; null if they are in a database
 * @returns {Message}
 */
export function emptyGalleryMessage(command) {
  const title = "This gallery has no photos yet";
  if (command === null) return { kind: "empty", title, text: "Where the photos are, index them with 'sbtk index', and run 'sbtk push'." };
  return { kind: "empty", title, text: "Add a folder, and its photos appear here. Or run, with the folder in place of PHOTOS:", command, canAdd: true };
}

/**
 * Returns the message for a status of the server; null if the server works.
 * @param {Status} status
 * @param {Health} health
 * @param {string} command that starts the server
 * @returns {Message | null}
 */
export function statusMessage(status, health, command) {
  if (status === "loading") {
    return { kind: "loading", title: "The engine is starting", text: "You can already draw. Photos appear when it is ready." };
  }
  if (status === "unreachable") {
    return {
      kind: "error",
      title: "Cannot reach the server",
      text: "Your sketch is kept, and the page reconnects by itself. To start the server, run:",
      command,
    };
  }
  if (status === "unauthorized") {
    return {
      kind: "error",
      title: "Sign-in required",
      text: "Open the address that sbtk serve printed at start. It ends with ?token= and the token.",
    };
  }
  // If a new generation cannot be opened, the server reports the problem and serves the previous one.
  if (status === "failed" || health.problem) {
    const { message = "The engine did not start", next = "" } = health.problem ?? {};
    return errorMessage(message, next);
  }
  return null;
}

/**
 * @param {string} message
 * @param {string} next a command or a sentence
 * @param {boolean} [canRetry]
 * @returns {Message}
 */
export function errorMessage(message, next, canRetry = false) {
  const title = message.charAt(0).toUpperCase() + message.slice(1);
  return {
    kind: "error",
    title,
    text: isCommand(next) ? "To fix this, run:" : next.charAt(0).toUpperCase() + next.slice(1),
    command: isCommand(next) ? next : undefined,
    canRetry,
  };
}

/**
 * Shows a message, or hides it for null.
 * @param {Message | null} message
 */
export function showMessage(message) {
  const panel = byId("empty-state", HTMLElement);
  panel.hidden = message === null;
  if (message === null) {
    lastTitle = "";
    return;
  }
  panel.dataset.kind = message.kind;
  byId("empty-state-title", HTMLElement).textContent = message.title;
  byId("empty-state-text", HTMLElement).textContent = message.text;
  const command = byId("empty-state-command", HTMLElement);
  command.textContent = message.command ?? "";
  command.hidden = message.command === undefined;
  byId("retry", HTMLButtonElement).hidden = message.canRetry !== true;
  byId("empty-state-add", HTMLElement).hidden = message.canAdd !== true;
  if (message.title !== lastTitle) {
    announce([`${message.title}.`, message.text, message.command ?? ""].join(" ").trim());
  }
  lastTitle = message.title;
}
