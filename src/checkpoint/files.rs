//! The safetensors layout: its header written with aligned data, and read with every length checked against the file.
//!
//! Invariant: what [`decode_header`] returns lies wholly within the bytes it was given.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};

use safetensors::{SafeTensors, tensor::Metadata};
use serde::{Deserialize, Serialize, Serializer, ser::SerializeMap};

/// Data begins at a multiple of this: mapped floats are aligned for any vector load, and chunks keep that of the layout.
pub(super) const DATA_ALIGNMENT: usize = 64;

/// What the format's readers accept; ours is written within it.
const HEADER_BYTES_MAX: usize = 100_000_000;

/// A tensor's place in a file, as the header says it.
#[derive(Serialize)]
struct Entry<'a> {
    dtype: &'static str,
    shape: &'a [u64],
    data_offsets: [u64; 2],
}

struct Header<'a> {
    metadata: &'a [(&'a str, String)],
    entries: Vec<(&'a str, Entry<'a>)>,
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.entries.len() + 1))?;
        // Sorted, so that the same checkpoint is the same bytes.
        map.serialize_entry("__metadata__", &self.metadata.iter().cloned().collect::<BTreeMap<_, _>>())?;
        for (name, entry) in &self.entries {
            map.serialize_entry(name, entry)?;
        }
        map.end()
    }
}

/// The length field and header of a file of f32 tensors that follow one another in this order.
///
/// # Errors
///
/// In words, when the sizes overflow or the header is longer than readers of the format accept.
pub(super) fn encode_header(metadata: &[(&str, String)], tensors: &[(String, Vec<u64>)]) -> Result<Vec<u8>, String> {
    let mut entries = Vec::with_capacity(tensors.len());
    let mut end = 0u64;
    for (name, shape) in tensors {
        let bytes = shape.iter().try_fold(4u64, |bytes, dimension| bytes.checked_mul(*dimension));
        let start = end;
        end = bytes
            .and_then(|bytes| start.checked_add(bytes))
            .ok_or_else(|| format!("the sizes of the tensors up to `{name}` overflow"))?;
        entries.push((name.as_str(), Entry { dtype: "F32", shape, data_offsets: [start, end] }));
    }
    let mut json = serde_json::to_vec(&Header { metadata, entries }).map_err(|error| error.to_string())?;
    // Spaces after the object are part of the format, for exactly this.
    json.resize((json.len() + 8).next_multiple_of(DATA_ALIGNMENT) - 8, b' ');
    if json.len() > HEADER_BYTES_MAX {
        return Err(format!(
            "the header would have {} bytes, and readers of safetensors accept {HEADER_BYTES_MAX}; use more shards or larger chunks",
            json.len()
        ));
    }
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(bytes)
}

/// Reads the header of a safetensors file given whole: where its data begins, and what it holds.
///
/// # Errors
///
/// In words, what is wrong with the bytes.
pub fn decode_header(file: &[u8]) -> Result<(usize, Metadata), String> {
    #[derive(Default, Deserialize)]
    struct Offsets {
        #[serde(default)]
        data_offsets: (u64, u64),
    }
    let (length, rest) =
        file.split_first_chunk::<8>().ok_or("is shorter than the 8 bytes every safetensors file begins with")?;
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX as u64 || length > rest.len() as u64 {
        return Err(format!(
            "names a header of {length} bytes, and {} follow: it is truncated or no safetensors file",
            rest.len()
        ));
    }
    let (header, data) = rest.split_at(length as usize);
    // The safetensors crate adds offsets up before it compares them with the file, and nine enormous tensors overflow that sum.
    let offsets: HashMap<String, Offsets> =
        serde_json::from_slice(header).map_err(|error| format!("has a header that is not readable: {error}"))?;
    if let Some((name, _)) = offsets.iter().find(|(_, entry)| entry.data_offsets.1 > data.len() as u64) {
        return Err(format!("places tensor `{name}` beyond its end: it is truncated"));
    }
    let (_, metadata) = SafeTensors::read_metadata(file).map_err(|error| format!("has a bad header: {error}"))?;
    Ok((8 + length as usize, metadata))
}
