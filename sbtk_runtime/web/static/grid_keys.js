// Arrow keys among the cards, as they lie on the screen.

/**
 * @param {HTMLElement} list whose children each hold one link
 */
export function walkWithArrows(list) {
  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const links = [...list.querySelectorAll("a")];
    const index = links.findIndex((link) => link === document.activeElement);
    if (index < 0) return;
    const columns = columnsOf(links);
    /** @type {Record<string, number>} */
    const targets = {
      ArrowLeft: index - 1,
      ArrowRight: index + 1,
      ArrowUp: index - columns,
      ArrowDown: index + columns,
      Home: 0,
      End: links.length - 1,
    };
    const target = targets[event.key];
    if (target === undefined) return;
    event.preventDefault();
    links[target]?.focus();
  });
}

/** @param {Element[]} links */
function columnsOf(links) {
  const top = links[0].getBoundingClientRect().top;
  const next = links.findIndex((link) => Math.abs(link.getBoundingClientRect().top - top) > 4);
  return next < 0 ? links.length : next;
}
