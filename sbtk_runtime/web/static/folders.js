// The gallery's folders as choices of a list: nested ones indented, with what they hold altogether.

import { nameOf, pathOf } from "./names.js";

/** @typedef {import("./api.js").Folder} Folder */
/** @typedef {{ path: string, label: string, depth: number, count: number }} Choice */
/** @typedef {{ path: string, own: number, children: Map<string, Node> }} Node */

/**
 * Returns the folders photos are in, and those above them that tell some apart. A folder whose name
 * is not UTF-8 cannot be named in a query and is left out.
 * @param {readonly Folder[]} folders
 * @returns {Choice[]} every folder before those in it
 */
export function choicesFrom(folders) {
  /** @type {Node} */
  const root = { path: "", own: 0, children: new Map() };
  for (const folder of folders) {
    if (folder.path == null) continue;
    let node = root;
    for (const part of folder.path.split("/").filter(Boolean)) {
      const path = `${node.path}/${part}`;
      let child = node.children.get(part);
      if (child === undefined) {
        child = { path, own: 0, children: new Map() };
        node.children.set(part, child);
      }
      node = child;
    }
    node.own += folder.count;
  }
  /** @type {Choice[]} */
  const choices = [];
  for (const child of root.children.values()) collect(child, 0, "", choices);
  return choices;
}

/**
 * Fills a select element, keeping what is chosen where it is still there.
 * @param {HTMLSelectElement} select
 * @param {readonly Choice[]} choices
 */
export function fill(select, choices) {
  const chosen = select.value;
  const all = new Option("All folders", "");
  const options = choices.map(({ path, label, depth, count }) => {
    const option = new Option(`${"\u2003".repeat(depth)}${label} (${count.toLocaleString("en")})`, path);
    option.title = pathOf({ path });
    return option;
  });
  select.replaceChildren(all, ...options);
  select.value = choices.some(({ path }) => path === chosen) ? chosen : "";
}

/**
 * @param {Node} node
 * @param {number} depth
 * @param {string} prefix names of folders above that hold this one only
 * @param {Choice[]} choices
 */
function collect(node, depth, prefix, choices) {
  const label = prefix + nameOf({ path: node.path });
  const children = [...node.children.values()];
  if (node.own === 0 && children.length === 1) {
    // Above the first choice the way to it tells nothing.
    collect(children[0], depth, depth === 0 ? "" : `${label}/`, choices);
    return;
  }
  choices.push({ path: node.path, label, depth, count: countOf(node) });
  for (const child of children) collect(child, depth + 1, "", choices);
}

/**
 * @param {Node} node
 * @returns {number}
 */
function countOf(node) {
  return node.own + [...node.children.values()].reduce((sum, child) => sum + countOf(child), 0);
}
