//! Messages as lines: written, cut out of what has come, and read.
//!
//! Invariant: a line is never longer than its limit, and memory for it grows with the bytes that came, never with a length that
//! somebody claimed.

use serde::{Serialize, de::DeserializeOwned};

use super::message::{Admission, Answer, Challenge, FromLauncher, ToLauncher};

/// Longest line of a caller that has proved itself: the declarations of a large model.
pub(super) const LINE_BYTES_MAX: usize = 16 << 20;

/// Most bytes that are taken from a caller that has not.
pub(super) const STRANGER_BYTES_MAX: usize = 4 << 10;

/// A message as a line.
pub(super) fn encode(message: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).expect("messages have text keys and finite numbers");
    line.push(b'\n');
    line
}

/// A line as a message; the error says what is wrong with it.
pub(super) fn decode<M: DeserializeOwned>(line: &[u8]) -> Result<M, String> {
    serde_json::from_slice(line).map_err(|e| e.to_string())
}

/// Reads bytes as lines and each line as every message that may come at a rendezvous, from either side; the number of messages
/// that could be read. For fuzzing: nothing is done with them.
///
/// # Errors
///
/// The words with which a line that is too long is refused.
pub fn decode_lines(bytes: &[u8]) -> Result<usize, String> {
    let mut buffer = LineBuffer::default();
    let mut read = 0;
    for piece in bytes.chunks(7) {
        buffer.extend(piece);
        while let Some(line) = buffer.next_line(STRANGER_BYTES_MAX)? {
            read += usize::from(decode::<Challenge>(&line).is_ok());
            read += usize::from(decode::<Answer>(&line).is_ok());
            read += usize::from(decode::<Admission>(&line).is_ok());
            read += usize::from(decode::<ToLauncher>(&line).is_ok());
            if let Ok(message) = decode::<FromLauncher>(&line) {
                read += 1;
                if let FromLauncher::View(view) = message {
                    let _ = view.unpack();
                }
            }
        }
    }
    Ok(read)
}

/// Bytes as they come in, taken out by line.
#[derive(Debug, Default)]
pub(crate) struct LineBuffer {
    bytes: Vec<u8>,
    /// Bytes already searched for a line's end.
    searched: usize,
}

impl LineBuffer {
    pub fn extend(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole line, without its end; an error if there is none within `limit` bytes.
    pub fn next_line(&mut self, limit: usize) -> Result<Option<Vec<u8>>, String> {
        let end = self.bytes[self.searched..].iter().position(|&byte| byte == b'\n').map(|at| self.searched + at);
        let too_long = || Err(format!("a line is longer than {limit} bytes"));
        match end {
            Some(end) if end > limit => too_long(),
            Some(end) => {
                let rest = self.bytes.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.bytes, rest);
                line.pop();
                self.searched = 0;
                Ok(Some(line))
            }
            None if self.bytes.len() > limit => too_long(),
            None => {
                self.searched = self.bytes.len();
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_out_whole_whatever_the_pieces() {
        let mut buffer = LineBuffer::default();
        let mut lines = Vec::new();
        for byte in b"one\ntwo\n\nthree" {
            buffer.extend(&[*byte]);
            while let Some(line) = buffer.next_line(16).unwrap() {
                lines.push(line);
            }
        }
        assert_eq!(lines, [b"one".to_vec(), b"two".to_vec(), b"".to_vec()]);
        buffer.extend(b"\n");
        assert_eq!(buffer.next_line(16).unwrap().unwrap(), b"three");
    }

    #[test]
    fn an_endless_line_is_refused_at_its_limit() {
        let mut buffer = LineBuffer::default();
        buffer.extend(&[b'x'; 16]);
        assert_eq!(buffer.next_line(16), Ok(None));
        buffer.extend(b"x");
        assert!(buffer.next_line(16).unwrap_err().contains("16 bytes"));
    }
}
