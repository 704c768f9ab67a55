//! [`Line`]: text for signal handlers.

/// Bytes of a line.
const CAPACITY: usize = 400;

/// A line of text in a fixed buffer, without allocation. Text that does not fit is cut off.
pub(crate) struct Line {
    bytes: [u8; CAPACITY],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Line { bytes: [0; CAPACITY], len: 0 }
    }
}

impl Line {
    pub(crate) fn push(&mut self, text: &[u8]) {
        let free = &mut self.bytes[self.len..];
        let len = text.len().min(free.len());
        free[..len].copy_from_slice(&text[..len]);
        self.len += len;
    }

    pub(crate) fn push_number(&mut self, number: u64) {
        self.push_in_base(number, 10);
    }

    pub(crate) fn push_hex(&mut self, number: u64) {
        self.push_in_base(number, 16);
    }

    fn push_in_base(&mut self, mut number: u64, base: u64) {
        let mut digits = [0; 20];
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b"0123456789abcdef"[(number % base) as usize];
            number /= base;
            if number == 0 {
                break;
            }
        }
        self.push(&digits[at..]);
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_has_numbers_and_is_cut_off_at_its_capacity() {
        let mut line = Line::default();
        line.push(b"n=");
        line.push_number(0);
        line.push(b",");
        line.push_number(u64::MAX);
        line.push(b",");
        line.push_hex(0xdead_beef);
        assert_eq!(line.as_bytes(), b"n=0,18446744073709551615,deadbeef");
        line.push(&[b'x'; CAPACITY]);
        assert_eq!(line.as_bytes().len(), CAPACITY);
    }
}
