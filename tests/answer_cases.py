"""Triples for tests of answers: kind, prediction and reference, separated by tabs."""

EQUAL = r"""
number	1,234	1234
number	1{,}234{,}567	1234567
number	1\,234\,567.5	1,234,567.5
number	-0.50	-1/2
number	.5	\frac12
number	1 1/2	\frac{3}{2}
number	-2\frac{1}{3}	-\frac{7}{3}
number	0.1\overline{6}	0.1\overline{6}
number	0.\overline{3}	1/3
number	\frac{1}{6}	0.1\overline{6}
number	0.\overline{3}	0.\overline{33}
number	0.\overline 3	.\overline{3}
number	0.\bar{3}	\frac13
number	-2.1\overline{36}	-\frac{47}{22}
number	0.\overline{142857}	1/7
number	0.\overline{9}	1
number	0.0\overline{12}	\frac{2}{165}
number	0.\overline{3}	0.3\overline{3}
number	1,234.\overline{5}	\frac{11111}{9}
number	x = 0.\overline{3}	x = \frac{1}{3}
number	17^{\text{th}}	17
number	17	17^{\text{th}}
number	17^\text{th}	17\text{th}
number	2^{\mathrm{nd}}	2
number	3^{\text{rd}}	3rd
number	1/17^{\text{th}}	\frac{1}{17}
unit	66.\overline{6}\%	\frac{200}{3}\%
unit	0.\overline{3}\text{ cm}	\frac{1}{3}\text{ cm}
number	3 \times 10^5	300000
number	3\times10^{-2}	0.03
number	1.5e3	1.5e3
number	3.83\times10^{35}	3.83e35
number	1e-05	0.00001
number	1e-5	0.00001
number	1e+16	10000000000000000
number	2e3	2000
number	2E3	2000
number	2.e3	2000
number	2e-03	2\times10^{-3}
number	-1.50e-7	-1.5\times10^{-7}
number	0.0001e4	1
number	1,234e2	123400
number	1e-300	10^{-300}
number	1e0000000000000000000000005	100000
number	x = 4.5e3	4500
number	(1e3, 2)	(1000, 2)
number	\pm 1e3	-1000, 1000
unit	3.0e8\text{ m/s}	3\times10^8\text{ m/s}
unit	3e8 meters	300000000
unit	\$1.2e6	1200000
formula	2e-3	2e - 3
formula	9e-24	-24+9e
formula	2e^3	2\cdot e^3
formula	3e2x	3e2x
number	\frac{22}{7}	22/7
number	2^{10}	1024
number	\dfrac{-3}{4}	-\tfrac34
number	−7	-7
number	½	½
root	\sqrt{8}	2\sqrt{2}
root	2√2	\sqrt{8}
root	sqrt(8)	2\sqrt2
root	\frac{1}{\sqrt{2}}	\frac{\sqrt2}{2}
root	\sqrt[3]{16}	2\sqrt[3]{2}
root	8^{1/2}	2\sqrt2
root	\sqrt{3+2\sqrt2}	1+\sqrt2
formula	(x+1)^2	x^2+2x+1
formula	x(x-1)	x^2-x
formula	\frac{x^2-1}{x-1}	x+1
formula	2\sin x\cos x	\sin(2x)
formula	\log_2 8	3
formula	\ln(e^2)	2
formula	e^{i\pi}	-1
formula	5!	120
formula	\binom{5}{2}	10
formula	\dbinom52	10
formula	\tbinom{5}{2}	10
formula	{5\choose2}	10
formula	{5 \choose 2}	\binom52
formula	\frac{{5\choose2}}{2}	5
formula	\sqrt{4\choose1}	2
formula	2{5\choose 2}+1	21
formula	n(n+1)/2	\frac{n^2+n}{2}
formula	2*pi*r	2\pi r
formula	x**2	x^2
formula	|{-3}|	3
formula	3x^2y-y	y(3x^2-1)
formula	a_1+a_2	a_2+a_1
formula	\alpha+\beta	\beta+\alpha
formula	\sin^2\theta+\cos^2\theta	1
formula	\frac{a}{b}	a/b
formula	2^{n+1}	2\cdot2^n
formula	\tan\frac{\pi}{4}	1
formula	x	\frac{2x}{2}
complex	2i+3	3+2i
complex	(1+i)^2	2i
complex	i^2	-1
complex	1+2i^3	1-2i
complex	\frac{1}{i}	-i
choice	B	B
choice	(B)	B
choice	\textbf{(B)}	B
choice	B)	B
choice	\textbf{B.}	B
choice	\text{(B).}	B
choice	\textbf{B)}	B
choice	$\mathbf{B.}$	B
choice	\mathrm{B}	(B)
choice	$B$	\text{B}
unit	5 cm	5
unit	5\text{ cm}	5\text{ centimeters}
unit	5	5\text{ cm}
unit	5\text{ apples}	5\text{ apples}
unit	5	5\text{ apples}
unit	25\%	25
unit	25\%	25 percent
unit	25%	25\%
unit	\$1,200	1200
unit	\$5	5 dollars
unit	60\text{ mph}	60\text{ miles per hour}
unit	60\text{ km/h}	60\text{ kilometers per hour}
unit	12\text{ square inches}	12\text{ in}^2
unit	12 \text{ cm}^{2}	12\,\mathrm{cm^2}
unit	45^{\circ}	45\text{ degrees}
unit	45°	45
unit	\frac{\pi}{4}\text{ radians}	\frac{\pi}{4}
unit	3\sqrt{2}\text{ m}	3\sqrt2
unit	10 square units	10
unit	\text{12 cm}	12 \text{ cm}
unit	3\text{ in}	3 \text{ inches}
unit	\$ 5	5\text{ dollars}
unit	1{,}000\text{ km}	1000
unit	100^\circ\text{C}	100^\circ \text{C}
unit	2.5\text{ kg}	\frac{5}{2}\text{ kilograms}
unit	1{,}200\text{ dollars}	\$1200
list	1, 2, 3	3,2,1
list	1, 2 and 3	1,2,3
list	1, 2, and 3	1,2,3
list	x = 1 \text{ or } x = 2	1, 2
list	x=1, x=2	x=2,x=1
list	\{1,2\}	1,2
list	\{2, 1\}	\{1, 2\}
list	\{ \frac12, 0.25 \}	\{\frac{1}{4}, 0.5\}
list	\pm 3	3,-3
list	x = \pm 3	-3, 3
list	x=2,y=3	y=3,x=2
list	\left\{1, 2\right\}	\{1,2\}
list	\lbrace 1,2\rbrace	\{1,2\}
list	1;2	1,2
list	{1, 2}	\{2,1\}
list	(1,2) \text{ and } (3,4)	(3,4), (1,2)
tuple	(1, 2)	(1,2)
tuple	\left(\frac{1}{2},3\right)	(0.5, 3)
tuple	(x,y)=(1,2)	(1,2)
tuple	(1,2),(3,4)	(3,4),(1,2)
tuple	\{(1,2),(3,4)\}	(3,4),(1,2)
tuple	\langle 1, 2 \rangle	\langle 1,2\rangle
tuple	(1, -\sqrt4)	(1,-2)
interval	[0, 1)	\left[0,1\right)
interval	x\in[0,1)	[0,1)
interval	(-\infty,3]	(-\infty, 3]
interval	(1,2)\cup(3,4)	(3,4)\cup(1,2)
interval	x \le 3	(-\infty, 3]
interval	x \leq 3	3 \geq x
interval	1<x<2	(1,2)
interval	1 \le x < 2	2 > x \ge 1
interval	x<1 \text{ or } x>2	(-\infty,1)\cup(2,\infty)
interval	(-∞, 3]	(-\infty,3]
interval	[0,\frac{1}{2}]	[0,0.5]
interval	(-\infty, -1) \cup (1, \infty)	(1,\infty) \cup (-\infty,-1)
interval	x<-1 \text{ or } x>1	(-\infty, -1) \cup (1, \infty)
matrix	\begin{pmatrix}1&2\\3&4\end{pmatrix}	\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
matrix	\begin{pmatrix}1/2\\3\end{pmatrix}	\begin{pmatrix} \frac{1}{2} \\ 3 \end{pmatrix}
matrix	\left[\begin{matrix}1\\2\end{matrix}\right]	\begin{bmatrix}1\\2\end{bmatrix}
equation	y = 2x + 1	y=1+2x
equation	2x+1	y = 2x+1
equation	x^2+y^2=4	y^2 = 4 - x^2
equation	2x+4y=6	x+2y=3
equation	y=5	5
equation	f(x)=x^2	x^2
equation	P = \frac{1}{3}	\frac13
equation	3x > 6y	2y < x
equation	x = \frac{1}{2}, y = 3	x=0.5,\ y=3
equation	\frac{x^2}{4}+\frac{y^2}{9}=1	9x^2+4y^2=36
text	\text{Yes}	yes
text	No.	\text{no}
text	\text{No.}	no
text	\mathbb R	\mathbb{R}
text	x \in \mathbb R	x\in\mathbb{R}
text	\mathbb R^2	\mathbb{R}^2
text	4^{\text{th}}\text{ of July}	4th of July
text	right triangle	\text{Right triangle}
text	\textbf{odd}	odd
text	3 : 4	3:4
text	3{:}30	3:30
text	3\colon 30	3:30
text	3\mathbin{:}30	3 : 30
text	3\!:\!30	3{:}30
text	2 {:} 3	2:3
text	3:00\text{ p.m.}	3:00\text{ PM}
text	3:00 p.m.	3:00\text{ PM}
text	\text{3:00 P.M.}	3:00\,\mathrm{pm}
text	3:00pm	3:00 PM
text	11{:}45\text{ a. m.}	11:45 AM
text	3\text{ p.m.}	3\text{ PM}
text	3 p.m.	3\text{ pm}
number	3{.}5	3.5
unit	90 \degree	90^\circ
unit	90\degree	90
unit	90^{\degree}	90°
unit	90^°	90\text{ degrees}
unit	20\degree\text{C}	20^\circ\text{C}
unit	20 \degree C	20^{\circ}C
unit	20\,\textdegree	20^\circ
formula	\sin 30\degree	\sin 30^\circ
text	\varnothing	\emptyset
text	Monday	\text{Monday}
text	red and blue	\text{red and blue}
text	\text{A and B}	A and B
text	\text{isosceles}	Isosceles
word	CAB	\text{CAB}
word	T F T	TFT
word	x = AB	AB
word	A\cdot B	AB
word	A*B*C	ABC
word	AB, CD	CD, AB
word	\{AB, CD\}	\{CD,AB\}
word	(AB)	AB
word	A*B	B*A
word	xy	yx
word	xyz	zyx
word	aB	Ba
word	\frac{AB}{2}	\frac{BA}{2}
word	2AB	2BA
word	\sqrt{AB}	\sqrt{BA}
word	V = IR	V - RI = 0
word	AB + CD	DC + BA
base	1011_2	1011_{2}
base	1A_{16}	1A_{16}
wrap	\boxed{7}	7
wrap	$\frac{1}{2}$	0.5
wrap	**7**	7
wrap	7.	7
wrap	\(7\)	7
wrap	\[7\]	7
wrap	$\$18.90$.	\$18.90
wrap	\displaystyle \frac12	\frac12
"""

UNEQUAL = r"""
number	5	-5
number	-5	5
number	7	8
number	1234	1235
number	12.34	1234
number	1,234	1.234
number	0.33	\frac13
number	0.333333333333	\frac13
number	0.3333333333333333333333333	\frac13
number	3.14159265358979	\pi
number	1.41421356237310	\sqrt2
number	0.0000001	0
number	10^{-20}	0
number	0.0000001	0.0000002
number	1000000.0000001	1000000
number	\sqrt2+10^{-30}	\sqrt2
number	10^{-30}\pi	2\cdot10^{-30}\pi
number	\pi 10^{-70}	0
number	\frac{1}{2}	\frac{2}{1}
number	1\frac12	\frac{1}{2}
number	12/5	1\frac{2}{5}
number	1 2	12
number	1 2	2
number	4\,5	45
number	1 000 0	10000
number	400	4
number	0.04	4
number	2.50	2.05
number	1/0	2/0
number	\infty	-\infty
number	3e5	3
number	1.000.000	1
number	3 .5	3.5
number	1, 234	1234
number	0,123	123
number	\pi+10^{-70}	\pi
number	\sqrt2(1+10^{-70})	\sqrt2
number	(1,234)	1234
number	0.\overline{3}	0.3
number	0.\overline{3}	0.333333333333
number	0.\overline{3}	\frac{1}{30}
number	0.\overline{36}	0.3\overline{6}
number	0.\overline{36}	0.\overline{63}
number	0.0\overline{3}	0.\overline{03}
number	0.\overline{3}	-0.\overline{3}
number	0.\overline{3}3	\frac13
number	0.\overline{9}9	1
number	2 0.\overline{3}	\frac{2}{3}
number	2 0.\overline{3}	2\frac{1}{3}
number	0.\overline{x}	0
number	\overline{3}	3
number	\overline{0.3}	0.3
number	0.\overline{33	\frac13
number	0.\overline{3}^2	\frac13
number	0.\overline{3}x	\frac13
number	1,234.\overline{5}	1, 234.\overline{5}
number	1.2.\overline{3}	1.2
number	17^{\text{th}}	18^{\text{th}}
number	17^{\text{th}}	17^{\text{cm}}
number	17^{\text{th}}	\frac{1}{17}
number	17^{th}	17
number	17th	17
number	17^{\text{t}}	17
number	17^{2\text{th}}	17
number	17^{\text{th}}	17\text{ cm}
number	17^{\text{th}} 3	17
number	2nd	2
number	5Th	5
number	x^{\text{th}}	x
number	17^{\text{th}}	1, 7
number	2e3	2e^3
number	2e3	2e+3
number	2e3	200
number	2e3	2000.0000000000000000001
number	2e	2
number	2e+3	2000
number	2e-3	0.002
number	9e-24	9\times10^{-24}
number	3e2x	300x
number	x3e2	300x
number	1.5e3x	1500x
number	1.5e-3x	0.0015x
number	1.5e-3.5	0.0015
number	e3	1000
number	e-3	0.001
number	2e^3	2000
number	2e3!	2000!
number	2^1e3	2^{1000}
number	\frac{1e3}{2}	\frac{e^3}{2}
number	1e-300	0
number	1e-300	2\times10^{-300}
number	1.5e300	1.5\times10^{301}
number	1e999	10^{998}
number	1e1000	10^{1000}
number	1e999999999	1
number	1e-999999999	0
number	1,234e2	1, 23400
number	1e5, 2	1
number	1 e5	100000
number	1e 5	100000
number	1e5e2	10000000
number	2·e3	2000
base	1E5_{16}	1E5
base	1E5_{16}	100000
unit	1e5\%	1000
root	\sqrt{8}	2\sqrt{3}
root	\sqrt[3]{8}	\sqrt{8}
root	-\sqrt2	\sqrt2
root	\sqrt{2}+\sqrt{3}	\sqrt{5}
formula	(x+1)^2	x^2+1
formula	x	X
formula	x^2	y^2
formula	\Delta	\delta
formula	\sin x	\sin y
formula	\sin x	\cos x
formula	\sin 30^\circ	\sin 30
formula	-x	x
formula	x+1	x
formula	abs	a
formula	at	a
formula	2x	2
formula	\frac{x+1}{2}	x+\frac{1}{2}
formula	n!	n
formula	\dbinom52	\dbinom25
formula	\dbinom52	\frac52
formula	\dbinom52	52
formula	{5\choose2}	{5\choose1}
formula	{5\choose2}	52
formula	5\choose2	5
formula	\{5\choose2\}	10
formula	{5\choose2\choose1}	10
formula	{5\choose}	5
formula	2{5\choose2}	10
formula	{5\choose2}^2	10
formula	{-5\choose2}	-10
formula	\int_0^1 x dx	\int_0^2 x dx
formula	1+2+\ldots+9	1+2+9
formula	\frac{0}{0}	1
formula	x'	x
formula	f'(x)	f(x)
formula	aB	ab
formula	xX	x^2
formula	x(3)	x^3
formula	x_1	x_2
formula	x_1	x
formula	x12	x_{12}
formula	{3}{4}	7
formula	2^3!	40320
formula	x2	2x
formula	2\frac{x}{3}	2+\frac{x}{3}
formula	1/2x	\frac{1}{2x}
formula	\sin 2x	2\sin x
formula	\sin x^2	\sin^2 x
formula	5 t	5
formula	5 h	5
formula	5 c	5
formula	A	a
formula	E	e
formula	I	i
formula	\log 100	\ln 100
formula	|x|	x
formula	\phi	\varphi
complex	3-2i	3+2i
complex	2i	2
complex	2+7i^2	2+7i
complex	i^2	i
complex	i^3	i
complex	i	1
choice	A	B
choice	A or B	A
choice	A, B	A
choice	A B	A
choice	\textbf{A.} B	A
choice	\textbf{A.B}	A
choice	\textbf{A.}\textbf{B.}	A
choice	\text{A. or B.}	A
choice	\textbf{A.}	B
choice	\textbf{A.}	a
choice	\textbf{AB.}	A
choice	\textbf{A.5}	A
choice	\text{-A.}	A
choice	\textbf{A..}	A
choice	\text{not A.}	A
choice	\text{K)}	K
choice	AB	A
choice	ABCD	A
choice	not A	A
choice	A: no, B	B
choice	(A)(B)	A
choice	A/B	A
choice	A^1	B
choice	A1	A
choice	\text{(C)}1	C
unit	5\text{ cm}	5\text{ m}
unit	5 cm	5 \text{ km}
unit	500\text{ cm}	5\text{ m}
unit	5\text{ cm}	5\text{ cm}^2
unit	5\text{ cm}^3	5\text{ cm}^2
unit	5\text{ hours}	5\text{ minutes}
unit	5\text{ apples}	5\text{ pears}
unit	5\text{ million}	5
unit	5	5\text{ million}
unit	5\text{ thousand}	5
unit	5\text{ dozen}	5
unit	5\text{ factorial}	5
unit	5\text{ or 6}	5
unit	5\text{ is wrong}	5
unit	5 (or 6)	5
unit	\$5	5 cents
unit	\$5	500 cents
unit	50\%	\frac12
unit	0.5	50\%
unit	50\%	0.5
unit	5000\%	50
unit	45^\circ	\frac{\pi}{4}
unit	45^\circ	45\text{ radians}
unit	20^\circ\text{C}	20^\circ\text{F}
unit	60\text{ mph}	60\text{ km/h}
unit	5s	5
unit	5m	5
unit	5x	5
unit	5\text{ x}	5
unit	5\text{K}	5
unit	5\text{ pi}	5
unit	\sqrt{2}\text{ m}	\sqrt{2}\text{ s}
unit	5\%	\$5
unit	5\text{ cm}	\$5
unit	3\text{ ft}	1\text{ yd}
unit	5\text{ and }6	5
list	1,2	1,2,3
list	1,2,3	1,2
list	1,2,3,4,5,6,7,8,9	5
list	1,1,2	1,2
list	1,2,4	1,2,3
list	-1,2	1,-2
list	\{1,2\}	\{1,3\}
list	\{\}	0
list	\pm 3	3
list	3	\pm 3
list	\pm 3	\pm 4
list	x=2,y=3	x=3,y=2
list	2,3	x=3,y=2
list	1,2	12
list	1\text{ or }2	1
list	1\text{ or }2	2
list	1, \ldots, 9	1, 9
list	1,2,,3	1,2,3
tuple	(2,1)	(1,2)
tuple	1,2	(1,2)
tuple	(1,2)	\{1,2\}
tuple	(1,2)	1,2
tuple	(1,2,3)	(1,2)
tuple	(1,2)	(1,2,3)
tuple	(1,-2)	(1,2)
tuple	(1,2),(3,4)	(1,4),(3,2)
tuple	(1,2),(3,4)	(1,2,3,4)
tuple	((1,2),3)	(1,2,3)
interval	(0,1)	[0,1]
interval	[0,1)	(0,1]
interval	[0,1]	[0,2]
interval	[0,1]	(0,1)
interval	[0,1]	\{0,1\}
interval	(1,2)\cup(3,4)	(1,2)\cap(3,4)
interval	(1,2)\cup(3,4)	(1,2)
interval	(1,2)\cup(3,4)	(1,2),(3,4)
interval	x<3	x \le 3
interval	x<3	x>3
interval	x>3	(-\infty,3)
interval	x<1 \text{ and } x>2	x<1 \text{ or } x>2
interval	x<3	3
interval	x \ne 3	3
interval	(-\infty,3]	(\infty,3]
interval	x \le 3	y \le 3
interval	\mathbb{R}	\mathbb{Z}
interval	(0,1)\setminus\{0.5\}	(0,1)
interval	(0,1]\cup\{2\}	(0,1]
matrix	\begin{pmatrix}1&2\\3&4\end{pmatrix}	\begin{pmatrix}1&3\\2&4\end{pmatrix}
matrix	\begin{pmatrix}1\\2\end{pmatrix}	\begin{pmatrix}1&2\end{pmatrix}
matrix	\begin{pmatrix}1\\2\end{pmatrix}	\begin{pmatrix}2\\1\end{pmatrix}
matrix	\begin{vmatrix}1&2\\3&4\end{vmatrix}	\begin{pmatrix}1&2\\3&4\end{pmatrix}
matrix	\begin{pmatrix}1&2\\3&4\end{pmatrix}	\begin{pmatrix}1&2&3&4\end{pmatrix}
matrix	-\begin{pmatrix}1\\2\end{pmatrix}	\begin{pmatrix}1\\2\end{pmatrix}
matrix	\begin{pmatrix}1&2\\3&4\end{pmatrix}^{-1}	\begin{pmatrix}1&2\\3&4\end{pmatrix}
matrix	\begin{pmatrix}1&2\\3&4\end{pmatrix}	\begin{pmatrix}1&2\\3&5\end{pmatrix}
matrix	\det\begin{pmatrix}1&0\\0&1\end{pmatrix}	1
matrix	\begin{pmatrix}1\\2\\3\end{pmatrix}	\begin{pmatrix}1\\2\end{pmatrix}
equation	y=2x	y=-2x
equation	y=2x+1	y=2x-1
equation	x=5	y=5
equation	x=5	x=6
equation	1=2=5	5
equation	3=5	5
equation	2x=5	5
equation	x+y=5	5
equation	x+y=5	x-y=5
equation	x^2+y^2=4	x^2+y^2=2
equation	x^2=-1	x^2=-4
equation	0=0	x=y
equation	3x>6y	x<2y
equation	x<y	x=y
equation	y^2=x^2	y=x
equation	xy=x	y=1
equation	y = 2x + 1	2y = 2x + 1
equation	x = y = 5	5
text	\text{east}	\text{seat}
text	seat	\text{east}
text	\text{yes}	\text{no}
text	east or west	east
text	north east	east
text	not even	even
text	\mathbb R	R
text	\mathbb R	\mathbb Z
text	\mathbb RR	\mathbb{RR}
text	\mathbb R^2	\mathbb{R^2}
text	\mathbb{R}2	\mathbb R^2
text	\mathbb{R}^+	\mathbb R
text	\bar{x}	x
text	\text{east.}	west
word	CAB	BAC
word	TFT	TTF
word	T F T	T T F
word	T\,F\,T	T\,T\,F
word	A B C D	D C B A
word	AB	BA
word	XI	IX
word	XIV	XVI
word	(TF)	(FT)
word	$TFT$	$FTT$
word	\mathrm{TFT}	TTF
word	\text{TFT}	TTF
word	x = AB	x = BA
word	x = AB	BA
word	V = IR	RI
word	(AB, CD)	(BA, CD)
word	AB, CD	BA, DC
word	\{AB, CD\}	\{BA, CD\}
word	\begin{pmatrix}AB\\C\end{pmatrix}	\begin{pmatrix}BA\\C\end{pmatrix}
word	A*B	BA
word	ABC	C*A*B
word	AB	A, B
word	AB	ab
word	AB	A+B
word	ABC	ABCC
word	AAB	ABB
word	ABC	AB
word	TTT	T^3
word	AB	2AB
word	AB	-AB
word	AB	AB\text{ cm}
word	ODD	DOD
word	NO	ON
word	YES NO	NO YES
text	odd	even
text	\text{I do not know}	5
text	The answer is 5	5
text	5 is the answer	5
text	5 because x = 7	5
text	answer: 5	5
text	Tuesday	Thursday
text	even or odd	odd
text	a:b	A:B
text	Yes and no	yes
text	\text{Evelyn Smith}	\text{Evelyn}
text	undefined	0
text	none	0
text	3{:}30	330
text	3{:}30	3:03
text	3{:}30	3.30
text	3{:}30	3,30
text	3{:}30	30:3
text	3:30	\frac{1}{10}
text	3:00\text{ p.m.}	3:00\text{ a.m.}
text	3:00\text{ PM}	3:00
text	3:00 p.m.	4:00 p.m.
text	3:00 p.m.	3:00\text{ m}
text	3\text{ p.m.}	3\text{ a.m.}
text	3\text{ p.m.}	3\text{ m}
text	3 p.m.	3pm
formula	2am	2AM
formula	3pm	3PM
formula	x{.}5	x^5
number	3{.}5	35
unit	90\degree	9^\circ
unit	90\degree	\frac{\pi}{2}
unit	90\degree	90\text{ radians}
unit	20\degree C	20\degree F
unit	20\degree C	20\degree
formula	\sin 30\degree	\sin 30
formula	x^\degree	x
text	\text{no solution}	\emptyset
base	52_9	52_8
base	25_8	52_8
base	52	52_8
base	42	52_8
base	1010_2	1010
trick	$1$ or $2$	2
trick	$1$, $2$	2
trick	1 $ 2	2
trick	\boxed{1}\boxed{2}	2
trick	\boxed{1} \boxed{2}	1
trick	5 \text{(not 6)}	5
trick	5\phantom{6}	5
trick	\foo 5	5
trick	\nonsense{42}	42
trick	x = \foo = 42	42
trick	5 % 6	5
trick	?	5
trick	*	5
trick	( )	5
trick	{}	0
trick	\text{}	5
trick	-	5
trick	\frac{1}{}	1
trick	\frac{}{1}	1
trick	5...	5
trick	42 !	42
"""
