//! The benchmarks that are no jobs: the optimizer over memory, and a checkpoint on a disk.
//!
//! Invariant: what is measured and its ceiling move the same bytes, in as many threads, in turn.

use serde_json::{Map, Value, json};

use super::{
    choice::Choice,
    parts::{measure, pace_arguments},
    show::Show,
    word,
};
use crate::{
    Result,
    optim::OptimizerConfig,
    tools::bench::{
        Figure, Row,
        disk::{Scratch, State},
        streams::Streams,
    },
};

fn object(fields: Value) -> Map<String, Value> {
    fields.as_object().cloned().unwrap_or_default()
}

/// Steps over memory.
pub(super) fn optimizer(choice: &Choice) -> Result<()> {
    let (gradient_dtype, wire_dtype) = (choice.dtype.dtypes().0, choice.dtype.copy());
    let configs = choice.sizes.iter().map(|size| choice.config(*size)).collect::<Result<Vec<_>>>()?;
    let about = format!(
        "{} over memory, {} gradients in {}, {}, {} threads; ceiling: a plain loop over the same arrays",
        word(&choice.optimizer),
        choice.workers,
        gradient_dtype,
        if wire_dtype.is_some() { "with the copy for the wire" } else { "sent from where the parameters lie" },
        choice.threads
    );
    let mut show = Show::new(choice, &about);
    for (size, config) in choice.sizes.iter().zip(configs) {
        let streams = Streams {
            kind: choice.optimizer.kind(),
            gradient_dtype,
            wire_dtype,
            elements: size / choice.element_bytes(),
            chunk_elements: config.layout_options().chunk_elements,
            workers: choice.workers,
            threads: choice.threads,
            pace: choice.free_pace(),
        };
        let (mut ceilings, mut figures) = (Vec::new(), Vec::new());
        for done in 0..choice.repetitions {
            show.progress(*size, done);
            ceilings.push(measure(&arguments(choice, &streams, true))?);
            figures.push(measure(&arguments(choice, &streams, false))?);
        }
        let figure = Figure::median(&figures).expect("there is at least one repetition");
        let per_parameter = streams.bytes_per_parameter();
        let more = object(json!({
            "dtype": word(&choice.dtype), "optimizer": word(&choice.optimizer), "repetitions": figures.len(),
            "rounds": figure.rounds, "seconds": figure.seconds, "threads": choice.threads, "copy": wire_dtype.is_some(),
            "isa": crate::optim::isa(), "bytes_per_parameter": per_parameter,
            "parameters_per_s": (figure.bytes_per_s / per_parameter as f64).round(),
        }));
        let row =
            Row { benchmark: choice.kind.name(), bytes: *size, workers: Some(choice.workers), more, ..Row::default() };
        show.row(row.with(&figure, Figure::median(&ceilings).as_ref()));
    }
    show.finish()
}

fn arguments(choice: &Choice, streams: &Streams, plain: bool) -> Vec<String> {
    let mut arguments = vec!["streams".to_string()];
    let options = [
        ("--optimizer", word(&choice.optimizer)),
        ("--dtype", word(&choice.dtype)),
        ("--elements", streams.elements.to_string()),
        ("--chunk-elements", streams.chunk_elements.to_string()),
        ("--workers", streams.workers.to_string()),
        ("--threads", streams.threads.to_string()),
    ];
    arguments.extend(options.into_iter().flat_map(|(option, value)| [option.to_string(), value]));
    arguments.extend(pace_arguments(streams.pace));
    arguments.extend(plain.then(|| "--plain".into()));
    arguments
}

/// Writes checkpoints.
pub(super) fn checkpoint(choice: &Choice) -> Result<()> {
    let about = format!(
        "of {} state, {} servers, in {}; ceiling: a plain write of as many bytes",
        word(&choice.optimizer),
        choice.servers,
        choice.dir.display()
    );
    let mut show = Show::new(choice, &about);
    for size in &choice.sizes {
        let config = choice.config(*size)?;
        let optimizer = OptimizerConfig::new(choice.optimizer.kind(), 1e-3);
        let state = State::new(*size, choice.servers, config.layout_options().chunk_elements, optimizer)?;
        let (mut cached, mut direct, mut figures) = (Vec::new(), Vec::new(), Vec::new());
        let mut written = 0;
        for done in 0..choice.repetitions {
            show.progress(*size, done);
            let scratch = Scratch::new(&choice.dir)?;
            let measured = state.write(scratch.path(), 1)?;
            drop(scratch);
            written = measured.bytes;
            figures.push(Figure::together(&[measured]));
            cached.push(plain(choice, written, false)?);
            // Not every file system has direct writes.
            direct.extend(plain(choice, written, true));
        }
        let ceilings = [("cached", Figure::median(&cached)), ("direct", Figure::median(&direct))];
        let fastest = ceilings
            .into_iter()
            .filter_map(|(how, figure)| Some((how, figure?)))
            .max_by(|a, b| a.1.bytes_per_s.total_cmp(&b.1.bytes_per_s));
        let figure = Figure::median(&figures).expect("there is at least one repetition");
        let more = object(json!({
            "optimizer": word(&choice.optimizer), "repetitions": figures.len(), "seconds": figure.seconds,
            "file_bytes": written, "ceiling_write": fastest.map(|(how, _)| how),
        }));
        let row =
            Row { benchmark: choice.kind.name(), bytes: *size, servers: Some(choice.servers), more, ..Row::default() };
        let row = row.with(&figure, fastest.map(|(_, figure)| figure).as_ref());
        // A repetition is one write: there is a median of repetitions and no percentile beyond.
        show.row(Row { latency_us_p99: None, latency_us_p999: None, ..row });
    }
    show.finish()
}

fn plain(choice: &Choice, bytes: u64, direct: bool) -> Result<Figure> {
    let scratch = Scratch::new(&choice.dir)?;
    let mut arguments = vec!["plain-write".to_string()];
    let dir = scratch.path().to_str().map(String::from);
    let dir = dir.ok_or_else(|| crate::Error::Config(format!("--dir {}: name it in UTF-8", choice.dir.display())))?;
    let options = [("--dir", dir), ("--bytes", bytes.to_string()), ("--files", choice.servers.to_string())];
    arguments.extend(options.into_iter().flat_map(|(option, value)| [option.to_string(), value]));
    arguments.extend(direct.then(|| "--direct".into()));
    measure(&arguments)
}
