//! A benchmark's rows as a drawing: what was reached and its ceiling over the size, both axes by powers.
//!
//! Invariant: every row that has the number drawn is a point of it, and nothing is drawn that is in no row.

use std::path::Path;

use plotters::prelude::*;

use super::Row;
use crate::{Error, Result};

const SIZE: (u32, u32) = (960, 600);
const OWN: RGBColor = RGBColor(0x1f, 0x5f, 0xa8);
const CEILING: RGBColor = RGBColor(0xb0, 0x4a, 0x2f);

/// A line of the drawing.
struct Series {
    name: &'static str,
    color: RGBColor,
    points: Vec<(f64, f64)>,
}

/// Writes the rows of one benchmark to `path` as SVG: rates where rows have them, else medians.
///
/// # Errors
///
/// [`Error::File`] if it cannot be written; [`Error::Config`] if no row has anything to draw.
pub fn plot(path: &Path, title: &str, rows: &[Row]) -> Result<()> {
    let text = draw(title, rows)?;
    std::fs::write(path, text).map_err(|error| Error::file("write", path, error))
}

fn draw(title: &str, rows: &[Row]) -> Result<String> {
    let has_rates = rows.iter().any(|row| row.bytes_per_s.is_some());
    let points = |number: fn(&Row) -> Option<f64>| {
        let points = rows.iter().filter_map(|row| Some((row.bytes as f64, number(row)?)));
        let mut points: Vec<(f64, f64)> = points.filter(|(_, y)| *y > 0.0 && y.is_finite()).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    };
    let (unit, own, ceiling) = match has_rates {
        true => ("bytes/s", points(|row| row.bytes_per_s), points(|row| row.ceiling_bytes_per_s)),
        false => ("microseconds, median", points(|row| row.latency_us_p50), points(|row| row.ceiling_latency_us)),
    };
    let series = [
        Series { name: "gradwire", color: OWN, points: own },
        Series { name: "ceiling", color: CEILING, points: ceiling },
    ];
    let all: Vec<(f64, f64)> = series.iter().flat_map(|series| series.points.iter().copied()).collect();
    if all.is_empty() {
        return Err(Error::Config("--plot: there is nothing to draw".into()));
    }
    let mut text = String::new();
    drawn(&mut text, title, unit, &series, &all).map_err(|error| Error::Config(format!("--plot: {error}")))?;
    Ok(text)
}

/// A range around all numbers with some room on either side.
fn around(numbers: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let (least, most) = numbers.fold((f64::MAX, f64::MIN), |(least, most), x| (least.min(x), most.max(x)));
    least / 2.0..most * 2.0
}

fn drawn(
    text: &mut String,
    title: &str,
    unit: &str,
    series: &[Series],
    all: &[(f64, f64)],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (x, y) = (around(all.iter().map(|point| point.0)), around(all.iter().map(|point| point.1)));
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(88)
        .build_cartesian_2d(x.log_scale(), y.log_scale())?;
    let label = |number: &f64| format!("{number:.1e}");
    let size = |number: &f64| super::plain_bytes(number.round() as u64);
    chart.configure_mesh().x_desc("bytes").y_desc(unit).x_label_formatter(&size).y_label_formatter(&label).draw()?;
    for Series { name, color, points } in series.iter().filter(|series| !series.points.is_empty()) {
        let color = *color;
        chart
            .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(4))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(bytes: u64, rate: Option<f64>, median: Option<f64>) -> Row {
        Row {
            bytes,
            bytes_per_s: rate,
            latency_us_p50: median,
            ceiling_bytes_per_s: rate,
            ceiling_latency_us: median,
            ..Row::default()
        }
    }

    /// Circles of the drawing that have this color: the points of a line.
    fn points(text: &str, color: &str) -> usize {
        let document = roxmltree::Document::parse(text).unwrap();
        let circles = document.descendants().filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "circle")));
        circles.filter(|circle| circle.attribute("stroke") == Some(color)).count()
    }

    #[test]
    fn every_row_is_a_point_of_both_lines() {
        let rows = [row(64, Some(1e6), Some(5.0)), row(4096, Some(3e9), None), row(1 << 20, None, Some(1.0))];
        let text = draw("a < b & \"c\"", &rows).unwrap();
        assert_eq!((points(&text, "#1F5FA8"), points(&text, "#B04A2F")), (2, 2), "{text}");
        let text = draw("medians", &rows[2..]).unwrap();
        assert_eq!((points(&text, "#1F5FA8"), points(&text, "#B04A2F")), (1, 1), "{text}");
        assert!(text.contains("microseconds"));
        assert!(draw("nothing", &[row(64, None, None)]).is_err());
    }
}
