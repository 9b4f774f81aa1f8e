//! The curves of loss and accuracy over the passes, as an SVG drawing.
//!
//! Invariant: the drawing is a pure function of the records.

use crate::record::Record;
use crate::train::Epoch;
use anyhow::{Result, anyhow};
use plotters::prelude::*;

const SIZE: (u32, u32) = (1_000, 420);
const COLOURS: [RGBColor; 8] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
    RGBColor(255, 127, 14),
    RGBColor(23, 190, 207),
    RGBColor(140, 86, 75),
    RGBColor(127, 127, 127),
];

/// Training loss on the left, held-out accuracy on the right, naive Bayes as a level line.
pub fn curves_svg(records: &[Record]) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        let (left, right) = area.split_horizontally(SIZE.0 / 2);
        panel(&left, records, "training loss", |epoch| epoch.loss)?;
        panel(&right, records, "held-out accuracy", |epoch| epoch.scores.accuracy)?;
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("the curves cannot be drawn: {error}")
}

struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

fn lines(records: &[Record], value: fn(&Epoch) -> f64) -> Vec<Line> {
    let trained = records.iter().filter(|record| !record.curve.is_empty());
    trained
        .map(|record| Line {
            name: format!("{}-{}", record.model, record.seed),
            points: record.curve.iter().map(|epoch| (epoch.epoch as f64, value(epoch))).collect(),
        })
        .collect()
}

fn panel(
    area: &DrawingArea<SVGBackend, plotters::coord::Shift>,
    records: &[Record],
    title: &str,
    value: fn(&Epoch) -> f64,
) -> Result<()> {
    let mut lines = lines(records, value);
    let last = lines.iter().flat_map(|line| &line.points).fold(2.0, |last: f64, point| last.max(point.0));
    let bayes = records.iter().find(|record| record.model == "bayes");
    if let (Some(bayes), true) = (bayes, title.contains("accuracy")) {
        let level = bayes.scores.accuracy;
        lines.push(Line { name: "bayes".to_string(), points: vec![(1.0, level), (last, level)] });
    }
    let values = || lines.iter().flat_map(|line| line.points.iter().map(|point| point.1));
    let (low, high) = values().fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
    let (low, high) = if low > high { (0.0, 1.0) } else { (low, high) };
    let margin = 0.05 * (high - low).max(0.01);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(1.0..last, low - margin..high + margin)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_desc("pass over the training titles")
        .x_labels(last as usize)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(failed)?;
    for (at, line) in lines.into_iter().enumerate() {
        let colour = COLOURS[at % COLOURS.len()];
        let series = LineSeries::new(line.points, colour.stroke_width(2));
        let drawn = chart.draw_series(series).map_err(failed)?;
        drawn.label(line.name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw().map_err(failed)
}
