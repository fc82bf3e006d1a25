// Paths for display, whatever bytes they consist of.

/** @typedef {{ path?: string | null, path_bytes?: string | null }} HasPath `path_bytes` is base64 */

/**
 * Returns a path on one line. Bytes that are not UTF-8, invisible characters and characters that change the
 * text direction are escaped.
 * @param {HasPath} item
 * @returns {string}
 */
export function displayPath(item) {
  return escapeInvisible(item.path ?? decodeBytes(item.path_bytes ?? ""));
}

/**
 * Returns the last part of a path.
 * @param {HasPath} item
 * @returns {string}
 */
export function displayName(item) {
  const path = displayPath(item);
  return path.slice(path.lastIndexOf("/") + 1) || path;
}

// Joiners are part of emoji and of scripts such as Persian. Elsewhere they are invisible.
const JOINER = /(?<=[\p{M}\p{Lo}\p{Emoji_Presentation}])[\u200c\u200d](?=[\p{Lo}\p{Extended_Pictographic}])/u;
const INVISIBLE = new RegExp(`(?!${JOINER.source})[\\p{C}\\p{Zl}\\p{Zp}]|(?! )\\p{Zs}`, "gu");

/**
 * @param {string} text
 * @returns {string}
 */
function escapeInvisible(text) {
  return text.replace(INVISIBLE, (character) => {
    const code = character.codePointAt(0) ?? 0;
    if (code < 0x100) return `\\x${code.toString(16).padStart(2, "0")}`;
    return code < 0x10000 ? `\\u${code.toString(16).padStart(4, "0")}` : `\\u{${code.toString(16)}}`;
  });
}

/**
 * @param {string} base64
 * @returns {string}
 */
function decodeBytes(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const decoder = new TextDecoder("utf-8", { fatal: true });
  let text = "";
  for (let index = 0; index < bytes.length; ) {
    const length = [4, 3, 2, 1].find((n) => isCharacter(decoder, bytes.subarray(index, index + n), n));
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
function isCharacter(decoder, bytes, length) {
  try {
    return bytes.length === length && [...decoder.decode(bytes)].length === 1;
  } catch {
    return false;
  }
}
