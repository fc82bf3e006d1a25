// Paths as people can read them, whatever bytes they are made of.

/** @typedef {{ path?: string | null, path_bytes?: string | null }} Named */

/**
 * The path of a photo on one line: bytes that are not UTF-8 and characters that would not show, or
 * would turn the text around, are escaped.
 * @param {Named} named
 * @returns {string}
 */
export function pathOf(named) {
  return printable(named.path ?? textFromBytes(named.path_bytes ?? ""));
}

/**
 * The last part of a path.
 * @param {Named} named
 * @returns {string}
 */
export function nameOf(named) {
  const path = pathOf(named);
  return path.slice(path.lastIndexOf("/") + 1) || path;
}

/**
 * The path as it really is, to be pasted elsewhere; null where text cannot hold it.
 * @param {Named} named
 * @returns {string | null}
 */
export function exactPathOf(named) {
  return named.path ?? null;
}

// Joiners make one sign of several in emoji and in scripts such as Persian; elsewhere they hide.
const JOINED = /(?<=[\p{M}\p{Lo}\p{Emoji_Presentation}])[\u200c\u200d](?=[\p{Lo}\p{Extended_Pictographic}])/u;
const HIDDEN = new RegExp(`(?!${JOINED.source})[\\p{C}\\p{Zl}\\p{Zp}]|(?! )\\p{Zs}`, "gu");

/**
 * @param {string} text
 * @returns {string}
 */
function printable(text) {
  return text.replace(HIDDEN, (character) => {
    const code = character.codePointAt(0) ?? 0;
    if (code < 0x100) return `\\x${code.toString(16).padStart(2, "0")}`;
    return code < 0x10000 ? `\\u${code.toString(16).padStart(4, "0")}` : `\\u{${code.toString(16)}}`;
  });
}

/**
 * @param {string} base64
 * @returns {string}
 */
function textFromBytes(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const decoder = new TextDecoder("utf-8", { fatal: true });
  let text = "";
  for (let index = 0; index < bytes.length; ) {
    const length = [4, 3, 2, 1].find((n) => isText(decoder, bytes.subarray(index, index + n), n));
    if (length === undefined) {
      text += `\\x${bytes[index].toString(16).padStart(2, "0")}`;
      index += 1;
    } else {
      text += decoder.decode(bytes.subarray(index, index + length));
      index += length;
    }
  }
  return text;
}

/**
 * @param {TextDecoder} decoder
 * @param {Uint8Array} bytes
 * @param {number} length
 */
function isText(decoder, bytes, length) {
  try {
    return bytes.length === length && [...decoder.decode(bytes)].length === 1;
  } catch {
    return false;
  }
}
