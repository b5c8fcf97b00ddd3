//! GRUB's script language (GRUB manual, "Writing full configuration files directly"): text to statements.

use std::rc::Rc;

/// Deepest nesting of blocks.
const MAX_DEPTH: usize = 32;
/// Most words and statements of one file.
const MAX_NODES: usize = 200_000;

/// A piece of a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Text as it stands.
    Text(String),
    /// `$name` or `${name}`; `quoted` ones are not split at blanks.
    Variable {
        /// Its name.
        name: String,
        /// Inside double quotes.
        quoted: bool,
    },
}

/// A word before expansion. Quotes make it a word even when it is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Word {
    /// Its pieces.
    pub parts: Vec<Part>,
    /// Has quotes.
    pub quoted: bool,
}

impl Word {
    fn is(&self, text: &str) -> bool {
        !self.quoted && matches!(self.parts.as_slice(), [Part::Text(t)] if t == text)
    }
}

/// One statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Statement {
    /// A command and its arguments, also `set` and assignments.
    Command(Vec<Word>),
    /// `if`/`elif` conditions with their bodies, and the `else` body.
    If(Vec<(Vec<Statement>, Vec<Statement>)>, Vec<Statement>),
    /// `for name in words; do body; done`.
    For(Word, Vec<Word>, Vec<Statement>),
    /// `while` (or, negated, `until`).
    While {
        /// Stops when the condition holds.
        until: bool,
        /// Condition.
        condition: Vec<Statement>,
        /// Body.
        body: Vec<Statement>,
    },
    /// `function name { body }`.
    Function(Word, Rc<Vec<Statement>>),
    /// `menuentry` or `submenu` with its arguments and body.
    Menu {
        /// A submenu.
        submenu: bool,
        /// Arguments.
        words: Vec<Word>,
        /// Body.
        body: Rc<Vec<Statement>>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(Word),
    /// `;` or a line's end.
    End,
}

/// Parses a whole file. Errors name the line.
pub fn parse(text: &str) -> Result<Vec<Statement>, String> {
    let tokens = tokenize(text)?;
    let mut parser = Parser { tokens, position: 0, depth: 0 };
    let statements = parser.block(&[])?;
    match parser.tokens.get(parser.position) {
        None => Ok(statements),
        Some((line, _)) => Err(format!("line {line}: unexpected end of a block")),
    }
}

fn tokenize(text: &str) -> Result<Vec<(usize, Token)>, String> {
    let mut tokens = Vec::new();
    let mut word: Option<Word> = None;
    let mut line = 1;
    let mut chars = text.chars().peekable();
    let push_text = |word: &mut Option<Word>, c: char| {
        let word = word.get_or_insert_default();
        match word.parts.last_mut() {
            Some(Part::Text(text)) => text.push(c),
            _ => word.parts.push(Part::Text(c.to_string())),
        }
    };
    let mut finish = |word: &mut Option<Word>, line: usize, then: Option<Token>| {
        tokens.extend(word.take().map(|word| (line, Token::Word(word))));
        tokens.extend(then.map(|token| (line, token)));
        if tokens.len() > MAX_NODES { Err(format!("line {line}: more than {MAX_NODES} words")) } else { Ok(()) }
    };
    let mut double_quoted = false;
    while let Some(c) = chars.next() {
        match c {
            '\n' if !double_quoted => {
                finish(&mut word, line, Some(Token::End))?;
                line += 1;
            }
            '"' => {
                double_quoted = !double_quoted;
                word.get_or_insert_default().quoted = true;
            }
            '\'' if !double_quoted => {
                word.get_or_insert_default().quoted = true;
                loop {
                    match chars.next() {
                        Some('\'') => break,
                        Some(c) => {
                            line += usize::from(c == '\n');
                            push_text(&mut word, c);
                        }
                        None => return Err(format!("line {line}: a ' without its end")),
                    }
                }
            }
            '\\' => match chars.next() {
                Some('\n') => line += 1,
                // Inside double quotes a backslash only protects these.
                Some(c) if double_quoted && !matches!(c, '$' | '"' | '\\') => {
                    push_text(&mut word, '\\');
                    push_text(&mut word, c);
                }
                Some(c) => {
                    push_text(&mut word, c);
                    if let Some(word) = word.as_mut() {
                        word.quoted = true;
                    }
                }
                None => {}
            },
            '$' => {
                let mut name = String::new();
                if chars.next_if_eq(&'{').is_some() {
                    name.extend(std::iter::from_fn(|| chars.next_if(|c| *c != '}' && *c != '\n')));
                    if chars.next_if_eq(&'}').is_none() {
                        return Err(format!("line {line}: '${{' without '}}'"));
                    }
                } else {
                    name.extend(std::iter::from_fn(|| chars.next_if(|c| c.is_ascii_alphanumeric() || *c == '_')));
                    if name.is_empty() && chars.next_if(|c| matches!(c, '?' | '#' | '*' | '@')).is_some() {
                        name.push('?');
                    }
                }
                if name.is_empty() {
                    push_text(&mut word, '$');
                } else {
                    let part = Part::Variable { name, quoted: double_quoted };
                    word.get_or_insert_default().parts.push(part);
                }
            }
            '#' if word.is_none() && !double_quoted => while chars.next_if(|c| *c != '\n').is_some() {},
            ';' if !double_quoted => finish(&mut word, line, Some(Token::End))?,
            c if c.is_whitespace() && !double_quoted => finish(&mut word, line, None)?,
            '{' | '}' if !double_quoted => {
                finish(&mut word, line, None)?;
                let brace = Word { parts: vec![Part::Text(c.to_string())], quoted: false };
                finish(&mut Some(brace), line, None)?;
            }
            c => {
                line += usize::from(c == '\n');
                push_text(&mut word, c);
            }
        }
    }
    if double_quoted {
        return Err(format!("line {line}: a \" without its end"));
    }
    finish(&mut word, line, Some(Token::End))?;
    Ok(tokens)
}

struct Parser {
    tokens: Vec<(usize, Token)>,
    position: usize,
    depth: usize,
}

impl Parser {
    fn line(&self) -> usize {
        self.tokens.get(self.position).or(self.tokens.last()).map_or(0, |(line, _)| *line)
    }

    fn next(&mut self) -> Option<Token> {
        let token = self.tokens.get(self.position).map(|(_, token)| token.clone());
        self.position += 1;
        token
    }

    fn at(&self, keyword: &str) -> bool {
        matches!(self.tokens.get(self.position), Some((_, Token::Word(word))) if word.is(keyword))
    }

    fn skip_ends(&mut self) {
        while matches!(self.tokens.get(self.position), Some((_, Token::End))) {
            self.position += 1;
        }
    }

    fn expect(&mut self, keyword: &str) -> Result<(), String> {
        self.skip_ends();
        if self.at(keyword) {
            self.position += 1;
            Ok(())
        } else {
            Err(format!("line {}: '{keyword}' expected", self.line()))
        }
    }

    /// Statements up to (not including) one of `ends`, or the file's end when there are none.
    fn block(&mut self, ends: &[&str]) -> Result<Vec<Statement>, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("line {}: blocks nested deeper than {MAX_DEPTH}", self.line()));
        }
        let mut statements = Vec::new();
        loop {
            self.skip_ends();
            if self.position >= self.tokens.len() {
                if ends.is_empty() {
                    break;
                }
                return Err(format!("line {}: '{}' expected", self.line(), ends.join("' or '")));
            }
            if ends.iter().any(|end| self.at(end)) {
                break;
            }
            statements.push(self.statement()?);
        }
        self.depth -= 1;
        Ok(statements)
    }

    fn statement(&mut self) -> Result<Statement, String> {
        for (keyword, until) in [("while", false), ("until", true)] {
            if self.at(keyword) {
                self.position += 1;
                let condition = self.block(&["do"])?;
                self.expect("do")?;
                let body = self.block(&["done"])?;
                self.expect("done")?;
                return Ok(Statement::While { until, condition, body });
            }
        }
        for (keyword, submenu) in [("menuentry", false), ("submenu", true)] {
            if self.at(keyword) {
                self.position += 1;
                let words = self.words(Some("{"));
                let body = Rc::new(self.braces()?);
                return Ok(Statement::Menu { submenu, words, body });
            }
        }
        if self.at("if") {
            return self.if_statement();
        }
        if self.at("function") {
            self.position += 1;
            let name = self.words(Some("{")).into_iter().next().unwrap_or_default();
            return Ok(Statement::Function(name, Rc::new(self.braces()?)));
        }
        if self.at("for") {
            self.position += 1;
            let mut words = self.words(None).into_iter();
            let name = words.next().unwrap_or_default();
            let values = words.skip(1).collect();
            self.expect("do")?;
            let body = self.block(&["done"])?;
            self.expect("done")?;
            return Ok(Statement::For(name, values, body));
        }
        if self.at("}") {
            return Err(format!("line {}: '}}' without '{{'", self.line()));
        }
        Ok(Statement::Command(self.words(None)))
    }

    fn if_statement(&mut self) -> Result<Statement, String> {
        let mut branches = Vec::new();
        let mut otherwise = Vec::new();
        self.position += 1;
        loop {
            let condition = self.block(&["then"])?;
            self.expect("then")?;
            let body = self.block(&["elif", "else", "fi"])?;
            branches.push((condition, body));
            if self.at("elif") {
                self.position += 1;
                continue;
            }
            if self.at("else") {
                self.position += 1;
                otherwise = self.block(&["fi"])?;
            }
            self.expect("fi")?;
            return Ok(Statement::If(branches, otherwise));
        }
    }

    fn braces(&mut self) -> Result<Vec<Statement>, String> {
        self.expect("{")?;
        let body = self.block(&["}"])?;
        self.expect("}")?;
        Ok(body)
    }

    /// Words up to the statement's end, or up to `stop` (a block's end if there is none).
    fn words(&mut self, stop: Option<&str>) -> Vec<Word> {
        let mut words = Vec::new();
        while !self.at(stop.unwrap_or("}")) {
            match self.next() {
                Some(Token::Word(word)) => words.push(word),
                Some(Token::End) | None => break,
            }
        }
        words
    }
}
