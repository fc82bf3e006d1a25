// What stands where hits would be: an invitation, or what is wrong and what helps.

import { announce } from "./announce.js";
import { byId } from "./page.js";

/** @typedef {import("./api.js").Health} Health */
/** @typedef {import("./health.js").Condition} Condition */
/**
 * @typedef {object} Message
 * @property {"welcome" | "wait" | "trouble" | "empty"} mood
 * @property {string} title
 * @property {string} text
 * @property {string} [command] to be typed
 * @property {boolean} [canRetry]
 */

/**
 * What to say about the server; null while it is well.
 * @param {Condition} condition
 * @param {Health} health
 * @returns {Message | null}
 */
export function serverMessage(condition, health) {
  if (condition === "loading") {
    return { mood: "wait", title: "The engine is starting", text: "Go on and draw: photos appear as soon as it is ready." };
  }
  if (condition === "gone") {
    return {
      mood: "trouble",
      title: "The server does not answer",
      text: "What you drew stays here, and this page goes on by itself once the server is back. Start it with",
      command: "sbtk serve",
    };
  }
  if (condition === "locked") {
    return {
      mood: "trouble",
      title: "This page needs its token",
      text: "Open the address that sbtk serve printed when it started: it ends in ?token= and the token.",
    };
  }
  // The gallery that was served before is served on where a newer one cannot be.
  if (condition === "failed" || health.problem) {
    const { message = "The engine did not start", next = "" } = health.problem ?? {};
    return problemMessage(message, next);
  }
  return null;
}

/**
 * @param {string} message
 * @param {string} next what to do: a command, or a sentence
 * @param {boolean} [canRetry]
 * @returns {Message}
 */
export function problemMessage(message, next, canRetry = false) {
  const title = message.charAt(0).toUpperCase() + message.slice(1);
  const isCommand = /^(sbtk|pip|python) /.test(next);
  return {
    mood: "trouble",
    title,
    text: isCommand ? "What helps:" : next,
    command: isCommand ? next : undefined,
    canRetry,
  };
}

/**
 * @param {number} count of photos in the gallery
 * @returns {Message}
 */
export function welcomeMessage(count) {
  const photos = count === 1 ? "the photo" : `${count.toLocaleString("en")} photos`;
  return {
    mood: "welcome",
    title: "Draw what you are looking for",
    text: count > 0 ? `The closest of ${photos} appear here while you draw.` : "The closest photos appear here while you draw.",
  };
}

/** @returns {Message} */
export function emptyGalleryMessage() {
  return {
    mood: "empty",
    title: "This gallery has no photos yet",
    text: "Index a folder of photos; this page notices. Type",
    command: "sbtk index PHOTOS",
  };
}

/** @returns {Message} */
export function emptyFolderMessage() {
  return { mood: "empty", title: "No photos here", text: "This folder has none. Choose another, or all folders." };
}

/** @returns {Message} */
export function noOtherPhotoMessage() {
  return { mood: "empty", title: "No other photos", text: "The gallery has none but this one." };
}

/** @returns {Message} */
export function noPhotoMessage() {
  const text = "Go back to the sketch, or draw another one.";
  return { mood: "trouble", title: "That photo is not in the gallery any more", text };
}

let said = "";

/**
 * Shows a message, or none.
 * @param {Message | null} message
 */
export function showMessage(message) {
  const panel = byId("panel", HTMLElement);
  panel.hidden = message === null;
  if (message === null) {
    said = "";
    return;
  }
  panel.dataset.mood = message.mood;
  byId("panel-title", HTMLElement).textContent = message.title;
  byId("panel-text", HTMLElement).textContent = message.text;
  const command = byId("panel-command", HTMLElement);
  command.textContent = message.command ?? "";
  command.hidden = message.command === undefined;
  byId("panel-retry", HTMLButtonElement).hidden = message.canRetry !== true;
  if (message.title !== said && message.mood !== "welcome") announce(`${message.title}. ${message.text}`);
  said = message.title;
}
