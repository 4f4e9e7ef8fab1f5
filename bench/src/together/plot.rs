//! The figures of Wharf's paper as drawings: time and bytes over hosts, with and without us.

use std::path::Path;

use anyhow::Context as _;
use plotters::prelude::*;

use super::{BYTES, OURS, SKOPEO, TIME, workload};
use crate::report::Report;

const SIZE: (u32, u32) = (900, 360);

/// Draws what a report has.
pub(super) fn draw(report: &Report, hosts: &[usize], file: &Path) -> anyhow::Result<()> {
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    let fail = |error: &dyn std::fmt::Display| anyhow::anyhow!("cannot draw: {error}");
    area.fill(&WHITE).map_err(|e| fail(&e))?;
    let halves = area.split_evenly((1, 2));
    for (half, (what, title)) in halves.iter().zip([
        (TIME, "seconds until all hosts have the image"),
        (BYTES, "MiB that left the registry"),
    ]) {
        let points = |target: &str| -> Vec<(f64, f64)> {
            let median = |n: &usize| {
                let series = report.get(&workload(what, *n), "", target)?;
                Some((*n as f64, series.median))
            };
            hosts.iter().filter_map(median).collect()
        };
        let lines = [(OURS, points(OURS), BLUE), (SKOPEO, points(SKOPEO), RED)];
        let all = lines.iter().flat_map(|(_, points, _)| points);
        let top = all.map(|(_, y)| *y).fold(1.0, f64::max) * 1.1;
        let right = hosts.last().copied().unwrap_or(1) as f64 + 1.0;
        let mut chart = ChartBuilder::on(half)
            .caption(title, ("sans-serif", 16))
            .margin(12)
            .x_label_area_size(32)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..right, 0.0..top)
            .map_err(|e| fail(&e))?;
        chart
            .configure_mesh()
            .x_desc("hosts that pull at the same moment")
            .draw()
            .map_err(|e| fail(&e))?;
        for (name, points, colour) in lines {
            let circles = points.iter().map(|at| Circle::new(*at, 3, colour.filled()));
            chart.draw_series(circles).map_err(|e| fail(&e))?;
            chart
                .draw_series(LineSeries::new(points.clone(), &colour))
                .map_err(|e| fail(&e))?
                .label(name)
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .border_style(BLACK)
            .background_style(WHITE)
            .draw()
            .map_err(|e| fail(&e))?;
    }
    area.present()
        .map_err(|e| fail(&e))
        .with_context(|| format!("{}", file.display()))
}
