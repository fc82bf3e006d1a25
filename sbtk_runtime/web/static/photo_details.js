// The metadata of the enlarged photo: date, camera, size and place. The server leaves out what is implausible.

import { byId } from "./dom.js";

/** @typedef {import("./api.js").Details} Details */

/**
 * Lists the metadata, or nothing for null.
 * @param {Details | null} details
 */
export function showDetails(details) {
  const list = byId("viewer-exif", HTMLDListElement);
  list.replaceChildren();
  if (details === null) return;
  if (details.is_changed) addRow(list, "Note", "The file has changed since it was indexed.");
  const { width_px: width, height_px: height, taken, camera, lens, exposure, latitude, longitude } = details;
  if (taken) addRow(list, "Taken", new Date(taken).toLocaleString("en-GB", { dateStyle: "long", timeStyle: "short" }));
  if (camera) addRow(list, "Camera", camera);
  if (lens) addRow(list, "Lens", lens);
  // A number and its unit stay on one line.
  if (exposure) addRow(list, "Exposure", exposure.replaceAll(/(?<!,) /g, "\u00a0"));
  if (width && height) addRow(list, "Size", `${width.toLocaleString("en")} × ${height.toLocaleString("en")} pixels`);
  if (latitude != null && longitude != null) addRow(list, "Place", placeLink(latitude, longitude));
}

/**
 * @param {HTMLElement} list
 * @param {string} name
 * @param {string | Node} value
 */
function addRow(list, name, value) {
  const [term, description] = [document.createElement("dt"), document.createElement("dd")];
  term.textContent = name;
  description.append(value);
  list.append(term, description);
}

/**
 * Returns a link that opens the user's own map application; nothing is loaded from the network.
 * @param {number} latitude
 * @param {number} longitude
 */
function placeLink(latitude, longitude) {
  const link = document.createElement("a");
  link.href = `geo:${latitude},${longitude}`;
  const [north, east] = [latitude < 0 ? "S" : "N", longitude < 0 ? "W" : "E"];
  link.textContent = `${Math.abs(latitude).toFixed(4)}° ${north}, ${Math.abs(longitude).toFixed(4)}° ${east}`;
  return link;
}
