// Package top shows a server in a terminal, again and again: its tree, how full it gets and how fast, and keys for the
// actions of the control API.
//
//	err := top.Run(ctx, api.NewClient("dmsnap.ctl"), top.Options{})
//
// Without a terminal, [Once] returns one report, and [Text] writes it. Everything is shown by words and not by colours.
//
// # Guarantees
//
//   - Everything is read and changed by the control API: a server that can't be reached or refuses an action is shown with
//     its message, and asked again. An action that removes something is executed after a confirmation.
//   - Run returns nil when the user or ctx ends it, with the terminal restored; the error is that of the terminal, or of a
//     server that never answered. Once returns the error of the server, or the cause of ctx.
//   - Run uses the terminal alone: one at a time. Once and Text may be called concurrently.
package top

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"

	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server/api"
)

// Options are how a server is shown. The zero value is usable.
type Options struct {
	Interval time.Duration // between reports; 0: a second
	Input    io.Reader     // nil: the terminal
	Output   io.Writer     // nil: the terminal
}

// Once returns a report with rates, which takes an interval.
func Once(ctx context.Context, c *api.Client, interval time.Duration) (monitor.Report, error) {
	var s monitor.Sampler
	t, err := c.Tree(ctx)
	if err != nil {
		return monitor.Report{}, err
	}
	s.Step(time.Now(), t)
	select {
	case <-ctx.Done():
		return monitor.Report{}, context.Cause(ctx)
	case <-time.After(interval):
	}
	if t, err = c.Tree(ctx); err != nil {
		return monitor.Report{}, err
	}
	return s.Step(time.Now(), t), nil
}

// Run shows a server until the user ends it or ctx ends, which is nil.
func Run(ctx context.Context, c *api.Client, o Options) error {
	if o.Interval == 0 {
		o.Interval = time.Second
	}
	opts := []tea.ProgramOption{tea.WithContext(ctx), tea.WithoutSignalHandler()}
	if o.Input != nil {
		opts = append(opts, tea.WithInput(o.Input))
	}
	if o.Output != nil {
		opts = append(opts, tea.WithOutput(o.Output))
	}
	last, err := tea.NewProgram(&model{ctx: ctx, client: c, interval: o.Interval, width: 80, height: 24}, opts...).Run()
	if ctx.Err() != nil {
		return nil
	}
	if m, ok := last.(*model); ok && err == nil && m.report.At.IsZero() {
		return m.err // it never answered
	}
	return err
}

// model is the state of the screen.
type model struct {
	ctx           context.Context
	client        *api.Client
	interval      time.Duration
	width, height int

	sampler  monitor.Sampler
	report   monitor.Report
	err      error  // why there is no later report
	selected string // the element
	first    int    // row that is shown first
	message  string // of the last action

	asking *action         // a text is asked for, or a confirmation
	of     monitor.Element // what the action is about
	text   []rune
	sure   bool // the text is there, and a confirmation is asked for
}

// Messages.
type (
	treeMsg struct {
		at   time.Time
		tree api.Tree
		err  error
	}
	doneMsg struct {
		what string
		err  error
	}
)

// Init begins with a report.
func (m *model) Init() tea.Cmd { return m.ask(0) }

// ask reads the tree after a while.
func (m *model) ask(after time.Duration) tea.Cmd {
	return func() tea.Msg {
		select {
		case <-m.ctx.Done():
		case <-time.After(after):
		}
		ctx, cancel := context.WithTimeout(m.ctx, 10*time.Second)
		defer cancel()
		t, err := m.client.Tree(ctx)
		return treeMsg{time.Now(), t, err}
	}
}

// Update handles a message.
func (m *model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case treeMsg:
		if m.err = msg.err; msg.err == nil {
			m.report = m.sampler.Step(msg.at, msg.tree)
			m.keepSelection()
		}
		if m.err != nil && m.report.At.IsZero() {
			return m, tea.Quit
		}
		return m, m.ask(m.interval)
	case doneMsg:
		m.message = msg.what + ": done"
		if msg.err != nil {
			m.message = msg.what + ": " + msg.err.Error()
		}
	case tea.KeyPressMsg:
		return m, m.key(msg.String(), msg.Text)
	}
	return m, nil
}

// keepSelection selects the first element when the selected one is gone.
func (m *model) keepSelection() {
	list := inOrder(m.report)
	if len(list) > 0 && !slices.ContainsFunc(list, func(e *monitor.Element) bool { return e.Name == m.selected }) {
		m.selected = list[0].Name
	}
}

// actions are those for an element.
func (m *model) actions(e *monitor.Element) (list []action) {
	all := originActions
	if m.report.Server == api.ServerOfFleet {
		all = fleetActions
	}
	for _, a := range all {
		if slices.Contains(a.kinds, e.Kind) && (a.possible == nil || a.possible(e)) {
			list = append(list, a)
		}
	}
	return list
}

// key handles a key.
func (m *model) key(key, text string) tea.Cmd {
	if m.asking != nil {
		return m.answer(key, text)
	}
	list := inOrder(m.report)
	at := slices.IndexFunc(list, func(e *monitor.Element) bool { return e.Name == m.selected })
	move := func(to int) {
		if len(list) > 0 {
			m.selected = list[min(max(to, 0), len(list)-1)].Name
		}
	}
	switch key {
	case "q", "ctrl+c", "esc":
		return tea.Quit
	case "down", "j":
		move(at + 1)
	case "up", "k":
		move(at - 1)
	case "pgdown", "space":
		move(at + m.rows())
	case "pgup":
		move(at - m.rows())
	case "home", "g":
		move(0)
	case "end", "G":
		move(len(list) - 1)
	default:
		if at < 0 {
			return nil
		}
		for _, a := range m.actions(list[at]) {
			if a.key == key {
				m.asking, m.of, m.text, m.sure, m.message = &a, *list[at], nil, a.ask == "", ""
				if a.ask == "" && a.loses == nil {
					return m.start()
				}
			}
		}
	}
	return nil
}

// answer handles a key while something is asked.
func (m *model) answer(key, text string) tea.Cmd {
	switch {
	case key == "ctrl+c" || key == "esc" || m.sure && key == "n":
		m.message, m.asking = m.asking.name+" "+m.of.Name+": cancelled", nil
	case m.sure:
		if key == "y" {
			return m.start()
		}
	case key == "enter" && len(m.text) > 0:
		if m.sure = true; m.asking.loses == nil {
			return m.start()
		}
	case key == "backspace":
		m.text = m.text[:max(0, len(m.text)-1)]
	default:
		m.text = append(m.text, []rune(text)...)
	}
	return nil
}

// start does the action that was asked for.
func (m *model) start() tea.Cmd {
	a, e, text := m.asking, m.of, string(m.text)
	m.asking = nil
	what := a.name + " " + e.Name
	m.message = what + " …"
	return func() tea.Msg { return doneMsg{what, a.do(m.ctx, m.client, &e, text)} }
}

// rows is how many elements are shown.
func (m *model) rows() int { return max(1, m.height-4) }

// View draws the screen.
func (m *model) View() tea.View {
	v := tea.NewView(m.screen())
	v.AltScreen = true
	return v
}

// screen is the text of the screen.
func (m *model) screen() string {
	if m.report.At.IsZero() {
		return "waiting for the server …\n"
	}
	list := inOrder(m.report)
	lines := rowsOf(m.report, m.width-2)
	at := slices.IndexFunc(list, func(e *monitor.Element) bool { return e.Name == m.selected })
	n := m.rows()
	m.first = max(0, min(m.first, len(lines)-n))
	if at >= 0 {
		m.first = min(max(m.first, at-n+1), at)
	}
	var b strings.Builder
	fmt.Fprintln(&b, clip(summary(m.report), m.width))
	fmt.Fprintln(&b, "  "+header(m.width-2))
	for i := m.first; i < min(m.first+n, len(lines)); i++ {
		mark := "  "
		if i == at {
			mark = "> "
		}
		fmt.Fprintln(&b, mark+lines[i])
	}
	for i := len(lines) - m.first; i < n; i++ {
		fmt.Fprintln(&b)
	}
	fmt.Fprintln(&b, clip(m.prompt(), m.width))
	b.WriteString(clip(m.help(list, at), m.width))
	return b.String()
}

// prompt is the line for questions, messages and errors.
func (m *model) prompt() string {
	switch {
	case m.asking != nil && !m.sure:
		return fmt.Sprintf("%s %s, %s: %s_", m.asking.name, printable(m.of.Name), m.asking.ask, printable(string(m.text)))
	case m.asking != nil:
		return printable(m.asking.loses(&m.of)) + " (y/n)"
	case m.err != nil:
		return "the server does not answer: " + printable(m.err.Error())
	}
	return printable(m.message)
}

// help is the last line: the keys.
func (m *model) help(list []*monitor.Element, at int) string {
	if m.asking != nil {
		return "Enter: go on   Esc: cancel"
	}
	words := []string{"arrows: select"}
	if at >= 0 {
		for _, a := range m.actions(list[at]) {
			words = append(words, a.key+": "+a.name)
		}
	}
	return strings.Join(append(words, "q: quit"), "   ")
}
