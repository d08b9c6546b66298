export {plot, barX, barY, rectY, dot, ruleX, ruleY, text, tip, pointer, pointerX, pointerY, link, line, tickX, axisX, axisY, axisFy, gridX, gridY, frame} from "@observablehq/plot";
